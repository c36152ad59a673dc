#!/bin/sh
# Process 1 of the boot in which dpkg configures the packages. The mounted root file system has the
# files of the packages, but no files that maintainer scripts create.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true DEBCONF_NOWARNINGS=yes
exec </dev/null >/dev/console 2>&1

own=/usr/lib/smolvm

end() {
    sync
    mount -o remount,ro /
    "$own/busybox" poweroff -f
}

disable() { # replace programs by /bin/true: they are slow under TCG, and not needed
    for program in "$@"; do
        mv "$program" "$program.real"
        ln -s /bin/true "$program"
    done
}

enable() {
    for program in "$@"; do
        mv "$program.real" "$program"
    done
}

owners() { # set owners and special modes, which the builder could not set without root
    while read -r mode owner path; do
        [ -e "$path" ] && [ ! -h "$path" ] || continue
        chown "$owner" "$path"
        chmod "$mode" "$path"
    done <"$own/modes"
}

certificates() { # replaces update-ca-certificates, which would start a thousand programs
    cd /usr/share/ca-certificates/mozilla || return
    cat ./*.crt >/etc/ssl/certs/ca-certificates.crt
    for name in *.crt; do
        ln -sf "$PWD/$name" "/etc/ssl/certs/${name%.crt}.pem"
    done
    openssl rehash /etc/ssl/certs
}

mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
cp /usr/share/base-passwd/passwd.master /etc/passwd
cp /usr/share/base-passwd/group.master /etc/group
find / -xdev ! -user 0 -exec chown -h 0:0 {} +
mkdir -p /var/lib/dpkg/info /run/sshd
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d

python=$(readlink -f /usr/bin/python3)
disable "$python" /usr/bin/ssh-keygen /usr/sbin/update-ca-certificates
dpkg --configure -a --force-confold --force-confdef || { echo "SMOLVM: dpkg failed"; end; }
enable "$python" /usr/bin/ssh-keygen /usr/sbin/update-ca-certificates

owners
certificates
depmod "$(uname -r)"
rm -f /usr/sbin/policy-rc.d /etc/ssh/ssh_host_* /var/log/*.log /var/log/apt/* "$own/modes"
[ -z "$(dpkg --audit)" ] || { dpkg --audit; end; }
echo "SMOLVM: configured"
end
