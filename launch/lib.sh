# shellcheck shell=bash
# What the launch scripts share. Sourced, not run.

dry_run=false

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() {
    printf '%s\n' "$*" >&2
}

# The comment at the head of a script is its help.
show_help() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# The value of the option that the words begin with.
value() {
    [ $# -gt 1 ] || fail "$1 needs a value; see --help"
    printf '%s' "$2"
}

# Words as one line of shell that can be pasted.
quoted() {
    local word line=
    for word in "$@"; do
        [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# Runs a command, or prints it in a dry run.
run() {
    if $dry_run; then
        quoted "$@"
    else
        "$@"
    fi
}

# `cascade train` wants a config and a folder; without them every machine would start for nothing.
check_training() {
    [ $# -gt 0 ] || fail "no config; give a file such as configs/tiny/base64.py, see --help"
    case "$1" in
        -*) fail "unknown option $1; options come before the config, see --help" ;;
    esac
    case " $* " in
        *" --workdir "* | *" --workdir="*) ;;
        *) fail "--workdir DIR is missing: the folder of the run" ;;
    esac
}
