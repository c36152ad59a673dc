# The guest's part of the transfers through a Linux guest's agent. The library sets `step` to the
# name of one of these functions, and the other variables below. Busybox has all that is used here.
export LC_ALL=C PATH="/usr/sbin:/usr/bin:/sbin:/bin:$PATH"
umask 077

# Make a temporary directory beside the path to copy to, which only this user can enter.
# Tell whether the path is a directory, so that the copy goes into the directory.
place() {
    if [ -n "$into" ] || [ -d "$target/" ]; then
        echo inside
        target=$target/$file_name
    fi
    make_temporary
}

make_temporary() {
    parent=${target%/*}/
    if [ -n "$make_dirs" ]; then
        (umask 022 && mkdir -p "$parent") || return
    fi
    mkdir "$parent$leaf"
}

# The same beside a file to write to, or beside the file that it links to. Tell the path of the file.
place_content() {
    [ ! -L "$target" ] || target=$(readlink -f "$target" && echo .) || return
    target=${target%"
."}
    [ ! -d "$target" ] || unlike "$target"
    make_temporary && printf %s "$target"
}

# Unpack an archive that was sent, and remove the archive.
unpack() {
    cd "$temporary" && mkdir -p tree && tar -xpof data -C tree && rm -f data
}

# Set the attributes of a file that was sent.
attributes() {
    cd "$temporary" && touch -d "@$mtime" data && chmod "$mode" data
}

# Set the attributes of bytes that were sent: by default, those of the file that they replace.
content_attributes() {
    cd "$temporary" || return
    if [ -e "$target" ]; then
        chown "$(stat -c %u:%g "$target")" data 2>/dev/null # only root may give files away
        mode=${mode:-$(stat -c %a "$target")}
    fi
    chmod "${mode:-644}" data # after the owner, whose change removes the set-user-id bit
}

# Rename to the final name; merge into a directory that exists already.
publish() {
    merge "$temporary/$content" "$target" && rmdir "$temporary"
}

merge() {
    if [ ! -L "$1" ] && [ -d "$1" ]; then
        if [ -L "$2" ] || [ -e "$2" ] && [ ! -d "$2" ]; then
            unlike "$2"
        elif [ -d "$2" ]; then
            for path in "$1"/* "$1"/.[!.]* "$1"/..?*; do
                if [ -L "$path" ] || [ -e "$path" ]; then
                    merge "$path" "$2/${path##*/}" || return
                fi
            done
            rmdir "$1"
        else
            mv -T "$1" "$2"
        fi
    elif [ ! -L "$2" ] && [ -d "$2" ]; then
        unlike "$2"
    else
        mv -fT "$1" "$2"
    fi
}

unlike() {
    printf "%s\n" "$1" >&2
    exit 3
}

# Remove what a failed transfer has left.
discard() {
    rm -rf "${target%/*}/$leaf" "$target/$leaf" "$(dirname "$(readlink -f "$target")")/$leaf"
}

# List a file or a directory. Each record begins with a word that is in no name.
list() {
    if [ ! -d "$source/" ]; then
        stat -Lc "$word %f %s %Y ." "$source"
        return
    fi
    cd "$source/" && find . -exec stat -c "$word %f %s %Y %n" {} + && find . -type l -exec sh -c '
        for path; do
            to=$(readlink "$path" && echo .) || exit
            printf "%s link 0 0 %s\\n%s to 0 0 %s\\n" "$word" "$path" "$word" "$to"
        done
    ' sh {} +
}

# List a directory without what is below its files.
entries() {
    if [ ! -d "$source/" ]; then
        stat "$source" >/dev/null && echo "it is not a directory" >&2
        return 1
    fi
    cd "$source/" && find . -maxdepth 1 -exec stat -c "$word %f %s %Y %n" {} +
}

info() {
    stat -Lc "$word %f %s %Y ." "$source"
}

exists() {
    [ ! -e "$source" ] || echo yes
}

remove() {
    if [ -L "$source" ] || [ ! -d "$source" ]; then
        rm "$source"
    elif [ -n "$recursive" ]; then
        rm -rf "$source"
    else
        rmdir "$source"
    fi
}

make_directory() {
    umask 022
    mkdir ${parents:+-p} "$source"
}

# Print or replace a small file in the user's home.
read_own() {
    [ ! -e ~/"$file_name" ] || cat ~/"$file_name"
}

write_own() {
    cat >~/"$file_name.$leaf" && mv -f ~/"$file_name.$leaf" ~/"$file_name" && return
    rm -f ~/"$file_name.$leaf"
    return 1
}

"$step"
