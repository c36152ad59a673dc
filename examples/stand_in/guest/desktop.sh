#!/bin/sh
# The desktop part of the stand-in; init.sh runs it once. It shows typed text on the screen, and
# reports each input event on the serial console, in decimal, with the fields of struct input_event:
#
#     INPUT keyboard|tablet|mouse TYPE CODE VALUE
#
# `INPUT NAME 0 3 0` (SYN_DROPPED) means that events were lost.

find_device() { # prints the device whose label ends in $1
    local device label
    for device in /dev/input/event*; do
        read -r label <"/sys/class/input/${device##*/}/device/name"
        case $label in *"$1") echo "$device" ;; esac
    done
}

# The kernel buffers only 64 events, so `cat` moves them at once into a pipe, which has room for
# 2,700. `cat` runs on the processor that handles interrupts, so a busy host delays both equally.
report() { # $1: the device's name in reports; $2: the end of its label
    local device
    for _ in $(seq 200); do # the kernel finds USB and PS/2 devices in the background
        device=$(find_device "$2")
        [ -z "$device" ] || break
        sleep 0.05
    done
    [ "$device" ] || return
    exec 3<"$device" # open the device now, so that no event is lost
    taskset 1 cat <&3 | hexdump -v -e "4/4 \"%.0s\" \"INPUT $1\" 2/2 \" %u\" 1/4 \" %d\n\"" &
    exec 3<&-
    opened=${opened:+$opened,}$1
}

report_input() {
    local irq opened=
    for irq in 1 12; do # let the first processor handle keyboard and PS/2 mouse
        echo 1 >/proc/irq/$irq/smp_affinity
    done
    report keyboard keyboard
    report tablet Tablet
    report mouse Mouse
    echo "STAND-IN: input=${opened:-none}"
}

show_typed() { # the terminal echoes input as long as a program reads it
    exec 3<>/dev/tty1
    # Show control keys like other keys; after Scroll Lock, let the next key resume the output.
    stty -icanon -isig ixon ixany start undef stop undef <&3
    printf '\033[2J\033[H\033[?25lsmolvm_async stand-in: type here\n' >&3 # ?25l: no cursor
    cat <&3 >/dev/null &
    exec 3<&-
}

# Let no key reset the guest, and make Print Screen an ordinary key.
echo 0 >/proc/sys/kernel/ctrl-alt-del
echo 0 >/proc/sys/kernel/sysrq
show_typed
report_input
