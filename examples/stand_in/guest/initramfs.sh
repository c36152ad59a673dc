#!/bin/busybox sh
# /init of the initramfs: load the disk's drivers, mount the root partition, start init.sh.

busybox mount -t devtmpfs devtmpfs /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys

while read -r module; do
    busybox insmod "/modules/$module"
done </modules/order

read -r arguments </proc/cmdline
for argument in $arguments; do
    case $argument in root=*) wanted=${argument#root=} ;; esac
done
until root=$(busybox findfs "$wanted" 2>/dev/null); do # the kernel scans the SCSI bus slowly
    busybox sleep 0.02
done

busybox mount -t ext4 "$root" /root
for mount in dev proc sys; do
    busybox mount --move "/$mount" "/root/$mount"
done
exec busybox switch_root /root /sbin/init
