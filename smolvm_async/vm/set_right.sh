# Runs as root in a clone of a Linux guest. The input assigns the variables below; without a
# `host_key`, the library does not use the guest's SSH server.
# Exit status 3: everything but the random numbers was set right.
eval "$(cat)"

printf %s "$seed" >/dev/urandom
# RNDRESEEDCRNG of <linux/random.h>: use the seed now, not when the kernel thinks it is time.
python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "w"), 0x5207)' 2>/dev/null ||
    perl -e 'open F, ">/dev/urandom"; exit !ioctl F, 0x5207, 0' 2>/dev/null ||
    [ -e /sys/bus/acpi/drivers/vmgenid ] || [ -e /sys/module/vmgenid ]
reseeded=$?

date -s "@$time" >/dev/null 2>&1 || date -s "@${time%.*}" >/dev/null

before=$(hostname)
echo "$hostname" >/proc/sys/kernel/hostname
echo "$hostname" >/etc/hostname
sed -i "s/\b$before\b/$hostname/g" /etc/hosts

finish() {
    [ "$reseeded" = 0 ] && exit
    echo "no python3, perl or vmgenid driver in the guest" >&2
    exit 3
}
[ -n "$host_key" ] || finish
umask 077
for key in /etc/ssh/ssh_host_*_key; do # the source has the others, too
    case $key in *_ed25519_key) ;; *) rm -f "$key" "$key.pub" ;; esac
done
printf '%s\n' "$host_key" >/etc/ssh/ssh_host_ed25519_key
printf '%s\n' "$host_key_public" >/etc/ssh/ssh_host_ed25519_key.pub
chmod 644 /etc/ssh/ssh_host_ed25519_key.pub
built_in=/run/smolvm/host_key # of the built-in Debian, which may be an image of the user's, too
[ ! -e $built_in ] || printf '%s\n' "$host_key" >$built_in
home=$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)
keys=$home/.ssh/authorized_keys
[ -e "$keys" ] && sed -i "\|$old_key|d" "$keys"
printf '%s\n' "$authorized_keys" >>"$keys"
chown "${SUDO_USER:-root}" "$keys"

# A signal reloads the server and its host keys; open connections stay.
systemctl reload ssh 2>/dev/null || systemctl reload sshd 2>/dev/null ||
    kill -HUP "$(cat /run/sshd.pid)"
finish
