#!/bin/sh
# qemu-ga runs this for guest-shutdown: `shutdown -h -P|-H|-r +0 message`. Process 1 does the rest.

case " $* " in
*" -r "*) reboot ;;
*) poweroff ;;
esac
