#!/bin/sh
# poweroff, halt, reboot, shutdown: process 1 does it.

case "${0##*/} $*" in
reboot* | *" -r"* | *" --reboot"*) kill -TERM 1 ;;
*" -c"*) echo "nothing is scheduled" >&2 ;;
*) kill -USR2 1 ;;
esac
