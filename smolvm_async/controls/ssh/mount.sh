# Mounts host directories in a Linux guest, and unmounts them; runs as root. Calls of the functions
# follow. Status 4: the guest lacks a driver. Status 5: a directory is in use.

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
umask 022
shares=/run/smolvm/shares           # the host's directories that the guest may not change
layers=/var/lib/smolvm/layers       # what the guest has written to them

fail() { # $1: status, $2: reason
    echo "$2" >&2
    exit "$1"
}

load() { # $1: whether a directory is read-only
    modprobe -qa 9pnet_virtio 9p 2>/dev/null
    [ -d /sys/bus/virtio/drivers/9pnet_virtio ] || fail 4 "the guest's kernel has no 9pnet_virtio"
    grep -qw 9p /proc/filesystems || fail 4 "the guest's kernel has no 9p"
    [ "$1" = 0 ] && return
    modprobe -q overlay 2>/dev/null
    grep -qw overlay /proc/filesystems || fail 4 "the guest's kernel has no overlay"
}

wait_for() { # $1: tag; the kernel needs some time for a device that was just plugged in
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            grep -qsx "$1" /sys/bus/virtio/drivers/9pnet_virtio/virtio*/mount_tag && return
            sleep 0.1 || sleep 1
        done
    done
    fail 1 "the device of the directory does not appear in the guest"
}

mount_9p() { # $1: tag, $2: path, $3: options
    grep -q "^$1 " /proc/mounts && return # by an earlier try, which was interrupted
    mkdir -p "$2" || fail 1 "no directory $2"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" || fail 1 "$2"
}

mount_overlay() { # $1: the host's directory, $2: path, $3: directory of the layer
    mkdir -p "$2" || fail 1 "no directory $2"
    if [ ! -e "$3/upper" ]; then
        mkdir -p "$3/upper" "$3/work" || fail 1 "no directory $3"
        chown "$(stat -c %u:%g "$1")" "$3/upper"
        chmod "$(stat -c %a "$1")" "$3/upper"
    fi
    mount -t overlay -o "lowerdir=$1,upperdir=$3/upper,workdir=$3/work" overlay "$2" || fail 1 "$2"
}

trust() { # $1: path; git refuses a repository of another user, such as a user of the host
    case $1 in *[\"\\]*) return ;; esac
    grep -qsF "\"$1\"" /etc/gitconfig ||
        printf '[safe]\n\tdirectory = "%s"\n\tdirectory = "%s/*"\n' "$1" "$1" >>/etc/gitconfig
}

share() { # $1: tag, $2: path, $3: ro or rw, $4: name of the layer
    done=$shares/$1.mounted
    [ -e "$done" ] && return # an earlier try has mounted it
    wait_for "$1"
    if [ "$3" = rw ]; then
        mount_9p "$1" "$2" cache=mmap,rw
    else
        mount_9p "$1" "$shares/$1" cache=none,ro
        mount_overlay "$shares/$1" "$2" "$layers/$4"
    fi
    trust "$2"
    : >"$done"
}

release() { # $1: tag, $2: path, $3: ro or rw
    [ -e "$shares/$1.mounted" ] || return
    umount "$2" 2>/dev/null || fail 5 "$2 is in use"
    rm "$shares/$1.mounted"
    [ "$3" = rw ] || umount "$shares/$1" 2>/dev/null || fail 5 "$2 is in use"
}

mkdir -p "$shares"
