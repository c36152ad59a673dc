#!/bin/sh
# Process 1 of the stand-in: describes its machine on the serial console, runs the guest agent, and
# obeys the power button. Kernel arguments `stand_in.*` make it misbehave.

export PATH=/bin

say() {
    echo "STAND-IN: $*"
}

option() { # prints the value of the kernel argument stand_in.$1
    local arguments argument
    read -r arguments </proc/cmdline
    for argument in $arguments; do
        case $argument in stand_in."$1"=*) echo "${argument#*=}" ;; esac
    done
}

# Shutdown. busybox's poweroff, halt and reboot send these signals to process 1.

end() { # $1: a message; $2: poweroff or reboot
    trap '' USR1 USR2 TERM
    say "$1"
    kill -KILL -1 # the remount below fails while a process writes to the disk
    sync
    mount -o remount,ro /
    "$2" -f
}

trap 'end "powering off" poweroff' USR1 USR2
trap 'end rebooting reboot' TERM
trap '' INT # sent by Ctrl-Alt-Del, after desktop.sh has disabled the immediate reset

watch_power_button() { # reads the button's events from stdin, 24 bytes each
    local events
    while events=$(dd bs=96 count=1 2>/dev/null | hexdump -v -e '1/1 "%02x"') && [ "$events" ]; do
        case $events in
        *0100740001000000*) # EV_KEY, KEY_POWER, pressed
            if [ "$(option power_button)" = ignore ]; then
                say "power button ignored"
            else
                kill -USR2 1
            fi
            ;;
        esac
    done
}

watch_power_buttons() {
    local name label event
    for name in /sys/class/input/event*/device/name; do
        read -r label <"$name"
        [ "$label" = "Power Button" ] || continue
        event=${name#/sys/class/input/}
        exec 3<"/dev/input/${event%%/*}" # open the device now, so that no press is lost
        watch_power_button <&3 &
        exec 3<&-
    done
}

# Start.

start_network() {
    ifconfig lo 127.0.0.1 up
    [ -e /sys/class/net/eth0 ] || return
    ifconfig eth0 up
    udhcpc -i eth0 -s /etc/network.sh -b >/dev/null 2>&1 &
}

start_ssh() { # its host key stays on the disk
    [ "$(option ssh)" = on ] || return
    dropbear -R -E 2>/dev/null
}

agent_port() {
    local port name
    for port in /sys/class/virtio-ports/*; do
        [ -e "$port/name" ] && read -r name <"$port/name" || continue
        [ "$name" != org.qemu.guest_agent.0 ] || echo "/dev/${port##*/}"
    done
}

start_agent() { # sets $agent to the agent's process id
    local port
    port=$(agent_port)
    [ "$port" ] && [ "$(option agent)" != off ] || return
    cd /tmp # for the files of commands: see windows.sh
    qemu-ga --method=virtio-serial --path="$port" --statedir=/run >/dev/null 2>&1 &
    agent=$!
    cd /
}

report_agent() { # the agent has started when it has opened its port
    [ "$agent" ] || return
    for _ in $(seq 250); do
        if ls -l "/proc/$agent/fd" 2>/dev/null | grep -q vport; then
            say agent=started
            return
        fi
        sleep 0.02
    done
}

# Reports.

efi_variable() { # $1: a variable of one byte; the value follows four bytes of attributes
    local file="/sys/firmware/efi/efivars/$1-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    if [ -e "$file" ]; then
        tail -c 1 "$file" | hexdump -v -e '1/1 "%d"'
    else
        echo none
    fi
}

tpm() { # $1: a command, for printf; prints the answer without tag, size and return code
    local answer
    exec 3<>/dev/tpmrm0
    printf "$1" >&3
    answer=$(dd bs=64 count=1 <&3 2>/dev/null | hexdump -v -e '1/1 "%02x"')
    exec 3<&-
    case $answer in
    8001????????00000000*) echo "${answer#????????????????????}" ;;
    *) echo none ;;
    esac
}

tpm_random() { # TPM2_GetRandom(8); the answer: a count, then the bytes
    tpm '\200\001\000\000\000\014\000\000\001\173\000\010' | cut -c 5-
}

tpm_resets() { # TPM2_ReadClock; the answer: time, clock, number of starts of this TPM
    tpm '\200\001\000\000\000\012\000\000\001\201' | cut -c 33-40
}

report_tpm() {
    local version=none
    [ ! -e /sys/class/tpm/tpm0 ] || read -r version </sys/class/tpm/tpm0/tpm_version_major
    say "tpm_version=$version"
    [ "$version" = 2 ] || return
    say "tpm_random=$(tpm_random)"
    say "tpm_resets=$((0x$(tpm_resets)))"
}

report_identity() {
    local id address=none
    read -r id </sys/class/dmi/id/product_uuid
    [ ! -e /sys/class/net/eth0 ] || read -r address </sys/class/net/eth0/address
    say "uuid=$id"
    say "mac=$address"
}

report_boots() { # counts boots on the disk and in UEFI variables
    local variables=/sys/firmware/efi/efivars name
    echo >>/boots
    say "disk_boots=$(wc -l </boots)"
    [ -e $variables ] || return
    name=StandInBoot$(($(ls $variables | grep -c StandInBoot) + 1))
    printf '\007\000\000\000\001' >"$variables/$name-6e3d3f7c-2f0b-4f7c-9d5e-6b0c6a5d8f10"
    say "efi_boots=$(ls $variables | grep -c StandInBoot)"
}

report_root() {
    local number place path controller
    while read -r _ _ number _ place _; do
        [ "$place" != / ] || path=$(readlink -f "/sys/dev/block/$number")
    done </proc/self/mountinfo
    controller=$(readlink -f "${path%%/host[0-9]*}/driver")
    say "root_device=${path##*/}"
    say "root_driver=${controller##*/}"
}

report_machine() {
    local id kib
    read -r id </proc/sys/kernel/random/boot_id
    read -r _ kib _ </proc/meminfo
    say "boot_id=$id"
    say "cpus=$(nproc)"
    say "memory_mib=$((kib / 1024))"
    say "secure_boot=$(efi_variable SecureBoot)"
    say "setup_mode=$(efi_variable SetupMode)"
    report_root
    report_tpm
    report_identity
    report_boots
}

# Misbehaviour.

and_then() {
    case $1 in
    reboot)
        [ ! -e /rebooted ] || return
        echo >/rebooted
        end rebooting reboot
        ;;
    panic)
        say panicking
        echo c >/proc/sysrq-trigger
        ;;
    poweroff)
        end "powering off" poweroff
        ;;
    esac
}

# Commands.

obey() { # runs each line that arrives on the serial console, without an echo
    local line
    stty -echo
    while read -r line; do
        eval "$line"
    done
}

for directory in run tmp; do
    mount -t tmpfs tmpfs "/$directory"
done
while read -r module; do
    insmod "/lib/modules/$module"
done </lib/modules/order
[ ! -e /sys/firmware/efi/efivars ] || mount -t efivarfs efivarfs /sys/firmware/efi/efivars

start_agent
start_network
start_ssh
watch_power_buttons
report_machine
report_agent
[ ! -e /bin/desktop ] || desktop
say ready
and_then "$(option then)"
[ "$(option shell)" != on ] || obey </dev/console &

while :; do # process 1 must not end; `wait` also reaps orphans, and lets the traps run
    sleep 86400 &
    wait $!
done
