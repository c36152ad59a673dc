#!/bin/sh
# udhcpc runs this script with the DHCP server's answer: $interface, $ip, $subnet, $router, $dns.

[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ifconfig "$interface" "$ip" netmask "$subnet"
[ -z "$router" ] || route add default gw "${router%% *}" dev "$interface" 2>/dev/null
for server in $dns; do
    echo "nameserver $server"
done >/etc/resolv.conf
[ "$1" = renew ] || echo "STAND-IN: address=$ip" >/dev/console
