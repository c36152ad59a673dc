#!/bin/busybox sh
# /init of the initramfs: load the drivers, mount the root file system, start its init.

busybox mount -t devtmpfs devtmpfs /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys

while read -r module; do
    busybox insmod "/modules/$module"
done </modules/order

init=/usr/lib/smolvm/init
read -r arguments </proc/cmdline
for argument in $arguments; do
    case $argument in smolvm.init=*) init=${argument#smolvm.init=} ;; esac
done

until [ -b /dev/vda ]; do
    busybox usleep 2000
done
busybox mount -t ext4 -o noinit_itable /dev/vda /root # noinit_itable: no writes in the background
for mount in dev proc sys; do
    busybox mount --move "/$mount" "/root/$mount"
done
exec busybox switch_root /root "$init"
