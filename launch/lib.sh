# shellcheck shell=bash
# What the launch scripts share. Sourced, not run.

dry_run=false

fail() {
    printf 'error: %s\n' "${*//$'\n'/ }" >&2
    exit 2
}

say() {
    printf '%s\n' "$*" >&2
}

# The comment at the head of a script is its help.
show_help() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# The value of the option that the words after KIND begin with, if it is of that kind. What has
# passed may be written into arithmetic, YAML (in quotes) and the names of files.
value() {
    local kind=$1 pattern rule LC_ALL=C
    shift
    [ $# -gt 1 ] || fail "$1 needs a value; see --help"
    case "$kind" in
        name)
            pattern='[a-zA-Z0-9][a-zA-Z0-9_.-]*'
            rule="letters, digits, - _ and . alone, and begin with a letter or digit"
            ;;
        address)
            pattern='[a-zA-Z0-9][a-zA-Z0-9_./:@-]*'
            rule="letters, digits, - _ . / : and @ alone, and begin with a letter or digit"
            ;;
        number) pattern='0|[1-9][0-9]{0,8}' rule="a whole number, 0 or more" ;;
        count) pattern='[1-9][0-9]{0,8}' rule="a whole number, 1 or more" ;;
        minutes) pattern='[0-9]{1,9}(\.[0-9]{1,9})?' rule="a number such as 8 or 0.5" ;;
        time) pattern='[0-9]+(-[0-9]+)?(:[0-9]+){0,2}' rule="a time such as 24:00:00" ;;
        topology) pattern='[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}' rule="such as 16x16" ;;
        sbatch)
            pattern='--?[a-zA-Z][a-zA-Z0-9-]*(=[][a-zA-Z0-9_./:@,=+%&|*-]*)?'
            rule="an option of sbatch such as --partition=gpu"
            ;;
    esac
    [[ $2 =~ ^($pattern)$ ]] || fail "$1 must be $rule, got ${2@Q}; see --help"
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
