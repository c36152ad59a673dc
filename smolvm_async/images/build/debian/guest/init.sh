#!/usr/lib/smolvm/busybox sh
# Process 1: starts the network and the SSH server, and watches the power button. The initramfs has
# already loaded the drivers.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
own=/usr/lib/smolvm
b=$own/busybox
config=/sys/firmware/qemu_fw_cfg/by_name/opt/smolvm

# Shutdown. /usr/lib/smolvm/end sends these signals to process 1.

finish() { # $1: poweroff or reboot
    trap '' USR1 USR2 TERM
    $b kill -TERM -1
    for _ in 1 2 3 4 5; do # give the processes a quarter of a second to end by themselves
        [ "$($b ls /proc | $b grep -c '^[0-9]')" -gt "$kernel" ] || break
        $b usleep 50000
    done
    $b kill -KILL -1
    $b sync
    $b mount -o remount,ro /
    $b "$1" -f
}

trap 'finish poweroff' USR1 USR2
trap 'finish reboot' TERM
trap '' INT HUP

watch_power_button() { # reads the button's events from stdin, 24 bytes each
    while events=$($b dd bs=96 count=1 2>/dev/null | $b hexdump -v -e '1/1 "%02x"') &&
        [ "$events" ]; do
        case $events in
        *0100740001000000*) $b kill -USR2 1 ;; # EV_KEY, KEY_POWER, pressed
        esac
    done
}

watch_power_buttons() {
    for name in /sys/class/input/event*/device/name; do
        read -r label <"$name" || continue
        [ "$label" = "Power Button" ] || continue
        event=${name#/sys/class/input/}
        exec 3<"/dev/input/${event%%/*}" # open the device now, so that no press is lost
        watch_power_button <&3 &
        exec 3<&-
    done
}

# Start.

start_network() { # QEMU's user network has the same addresses in every VM
    $b ifconfig lo 127.0.0.1 up
    $b ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
    $b route add default gw 10.0.2.2
}

set_identity() {
    read -r name <$config/hostname/raw # sets name, but fails: the file has no final newline
    [ "$name" ] || name=debian
    echo "$name" >/proc/sys/kernel/hostname
    echo "$name" >/etc/hostname
    printf '127.0.0.1 localhost\n::1 localhost\n127.0.1.1 %s\n' "$name" >/etc/hosts
    umask 077
    $b mkdir -p /root/.ssh
    $b cat $config/authorized_keys/raw >/root/.ssh/authorized_keys
    $b mkdir /run/smolvm
    host_key=/run/smolvm/host_key
    case $arguments in
    *smolvm.template*) $b mkfifo $host_key ;; # sshd waits until the parked process writes the key
    *) $b cat $config/ssh_host_ed25519_key/raw >$host_key ;;
    esac
    umask 022
}

keep_sshd() { # restart sshd if it ends: there is no other way to log in
    # With -r, sshd does not execute itself for each connection. From OpenSSH 9.8 on, it always
    # executes sshd-session.
    [ -e /usr/lib/openssh/sshd-session ] || fork_only=-r
    while :; do
        /usr/sbin/sshd -D $fork_only -f $own/sshd_config </dev/null >/dev/console 2>&1
        $b usleep 100000
    done
}

keep_parked() { # restart the parked process if it ends
    for name in /sys/class/virtio-ports/*/name; do
        read -r label <"$name" || continue
        [ "$label" = smolvm.control ] || continue
        name=${name%/name}
        while :; do
            $own/parked <>"/dev/${name##*/}" >&0
            $b usleep 100000
        done
    done
}

$b mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
$b mkdir -p /run/sshd /run/lock /dev/pts /dev/shm
$b mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
$b mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
$b mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
$b ln -sfn /proc/self/fd /dev/fd
kernel=$(($($b ls /proc | $b grep -c '^[0-9]') + 1))
read -r arguments </proc/cmdline # of the kernel
start_network
set_identity
keep_sshd &
watch_power_buttons
keep_parked &

while :; do # process 1 must not end; `wait` also reaps orphans, and lets the traps run
    $b sleep 86400 &
    wait $!
done
