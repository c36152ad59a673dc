#!/bin/sh
# Windows' powershell.exe, cmd.exe and taskkill.exe, as far as smolvm_async uses them: they decode
# what they are given, and run it with sh. A path of Windows is one name in the agent's directory,
# but the parts of the input come by SFTP, which makes directories of the path.

decoded() { # $1: PowerShell's -EncodedCommand
    printf %s "$1" | base64 -d | tr -d '\000'
}

words() { # $1: a command line; prints the words that Windows' C library makes of it, for eval
    printf %s "$1" | awk '
        BEGIN { RS = "\001"; quote = "\047" }
        {
            word = ""; inside = 0; some = 0; backslashes = 0; size = length($0)
            for (i = 1; i <= size + 1; i++) {
                c = substr($0, i, 1)
                if (c == "\\") { backslashes++; continue }
                half = c == "\"" ? int(backslashes / 2) : backslashes
                odd = c == "\"" && backslashes % 2
                if (backslashes) some = 1
                for (; half > 0; half--) word = word "\\"
                backslashes = 0
                if (c == "\"" && !odd) { inside = !inside; some = 1; continue }
                if (i > size || (!inside && (c == " " || c == "\t" || c == "\n"))) {
                    if (some) printf "%s ", quote word quote
                    word = ""; some = 0; continue
                }
                word = word (c == quote ? quote "\\" quote quote : c); some = 1
            }
        }'
}

value() { # $1: a value of the request
    printf %s "$1" | base64 -d
}

run() { # runner.ps1
    local names= directory= input= output= script= text= content= program= arguments= cwd= detached= whole=
    eval "$(sed -n 's/^env\.\([^ ]*\) \(.*\)/names="$names \1" env_\1=\2/p; s/^\([a-z]*\) /\1=/p')"
    [ "$whole" ] || return
    directory=$here/$(value "$directory")
    source=$directory\\content
    case $(value "$input") in
    empty) : >"$directory\\in" && : >"$directory\\end" && return ;;
    file) source=$directory\\in ;;
    live)
        source=$directory\\pipe
        mkfifo "$source"
        feed &
        ;;
    parts)
        source=$directory\\pipe
        parts=$(slashes "$directory")
        mkdir -p "${parts%/*}" && mkdir "$parts"
        mkfifo "$source"
        feed_parts &
        ;;
    here) value "$content" >"$source" ;;
    esac
    if [ "$(value "$output")" = session ]; then
        files=$directory\\
        trap 'kill $! 2>/dev/null; rm -f "$files"*; rm -rf "$parts"' EXIT
    else
        exec >>"$directory\\out" 2>>"$directory\\err"
    fi
    [ -z "$script" ] || value "$text" >"$here/$(value "$script")"
    program=$(value "$program")
    cwd=$(value "$cwd")
    arguments=$(value "$arguments" && echo .)
    eval "set -- \"\$program\" $(words "${arguments%.}")"
    for name in $names; do
        eval "text=\$env_$name"
        text=$(value "$text" && echo .)
        set -- "$name=${text%.}" "$@" # for env
    done
    while read -r name text; do # of set_env_vars()
        text=$(value "$text" && echo .)
        [ -z "$name" ] || set -- "$name=${text%.}" "$@"
    done <<EOF
$(cat "$here/.smolvm_env" 2>/dev/null)
EOF
    cd "${cwd:-/}" || exit 126
    (exec env "$@" <"$source") # a shell may open a file for its command itself
    set -- $?
    [ -z "$detached" ] || rm "$directory"\\*
    return "$1"
}

kill_marked() { # the script that ends a command over SSH
    local mark directory file
    mark=${script#*"LIKE '%"}
    mark=${mark%%"%'"*}
    directory=${script#*"Exists('"}
    directory=$here/${directory%%"'"*}
    for file in /proc/[0-9]*/cmdline; do # whose words end with NUL, where busybox's grep stops
        tr '\000' ' ' 2>/dev/null <"$file" | grep -qF "$mark" || continue
        file=${file#/proc/}
        kill -KILL $(tree "${file%/cmdline}") 2>/dev/null
    done
    rm -f "$directory"\\*
    rm -rf "$(slashes "$directory")"
}

slashes() { # $1: a path of Windows
    printf %s "$1" | tr '\\' /
}

feed_parts() { # passes on the files of the input, until an empty file
    local number=0
    exec >"$source"
    trap '' PIPE # drop the rest if the command closes its input
    while [ -e /proc/$$ ]; do
        if [ ! -e "$parts/$number" ]; then
            sleep 0.05
            continue
        fi
        [ -s "$parts/$number" ] || break
        cat "$parts/$number" 2>/dev/null
        rm "$parts/$number"
        number=$((number + 1))
    done
}

feed() { # passes on what comes into the file `in`, until its end
    exec 3<"$directory\\in" >"$source"
    while cat <&3 && [ ! -s "$directory\\end" ] && [ -e /proc/$$ ]; do sleep 0.05; done
    cat <&3
}

powershell() {
    for encoded; do :; done # the last argument
    script=$(decoded "$encoded")
    case $script in
    *'[ScriptBlock]::Create'*)
        read -r encoded # the first line of the input
        case $(value "$encoded") in *Add-Output*) run ;; *) exit 99 ;; esac
        ;;
    *Add-Output*) run ;;
    *Win32_Process*) kill_marked ;;
    *"| & '"*)
        path=${script#*"| & '"}
        path=$here/${path%%"'"*}
        [ "$(head -c 3 "$path" | base64)" = 77u/ ] || exit 99 # the byte order mark of UTF-8
        if grep -q '^function unpack' "$path"; then # files.ps1: the same steps are in files.sh
            cd "$here" && HOME=$here exec sh "$(command -v files.sh)"
        fi
        tail -c +4 "$path" | sed '$d' >"$path.sh" # without the line of the exit code
        sh "$path.sh"
        ;;
    esac
}

cmd() {
    case $3 in
    rmdir)
        shift 5
        for directory; do rm -f "$here/$directory"\\*; done
        ;;
    *)
        path=$here/$3
        [ "$(head -n 2 "$path")" = "$(printf '@echo off\r\nchcp 65001 >nul\r')" ] || exit 99
        tail -n +3 "$path" | sed 's/\r$//' >"$path.sh"
        sh "$path.sh"
        ;;
    esac
}

tree() { # $1: a process; stops its tree, and prints the numbers
    local child
    kill -STOP "$1"
    echo "$1"
    for child in $(grep -lsx "PPid:.$1" /proc/[0-9]*/status | cut -d/ -f3); do
        tree "$child"
    done
}

taskkill() { # /t /f /fi "PID eq N" /fi "IMAGENAME eq powershell.exe"
    [ "$6" = "IMAGENAME eq $(cat "/proc/${4#PID eq }/comm")" ] || exit 128
    kill -KILL $(tree "${4#PID eq }")
}

umask 077
here=${SMOLVM_HERE:-$PWD}
export SMOLVM_HERE="$here"
name=${0##*/}
"${name%.exe}" "$@"
