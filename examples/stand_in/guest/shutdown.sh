#!/bin/sh
# qemu-ga runs this script to shut down: `shutdown -h -P|-H|-r +0 message`. Process 1 does the rest.

case " $* " in
*" -r "*) reboot ;;
*) poweroff ;;
esac
