# Completion of `cascade` in bash, and in zsh after `autoload bashcompinit && bashcompinit`:
#
#     source launch/completion.bash
#
# Verbs and options are those that `cascade --help` and `cascade VERB --help` tell of; other words
# are completed as names of files.
# shellcheck shell=bash
declare -A _cascade_options

_cascade() {
    local word=${COMP_WORDS[COMP_CWORD]} asked
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        asked=$(cascade --help 2>/dev/null | sed -n 's/^  \([a-z]\+\) .*/\1/p')
    elif ((COMP_CWORD == 2)) && [[ ${COMP_WORDS[1]} =~ ^(data|eval|convert|bench)$ && $word != -* ]]; then
        asked=$(
            cascade "${COMP_WORDS[1]}" --help 2>/dev/null |
                grep -oE "^  [a-z]+  |cascade ${COMP_WORDS[1]} [a-z]+" | awk '{ print $NF }' | sort -u
        )
    elif [[ $word == -* ]]; then
        local verb=${COMP_WORDS[1]} config=
        case $verb in
            train | data | eval | convert | bench) config=${COMP_WORDS[2]#-*} ;;
        esac
        if [[ -z ${_cascade_options["$verb $config"]} ]]; then
            _cascade_options["$verb $config"]=$(
                cascade "$verb" ${config:+"$config"} --help 2>/dev/null |
                    grep -oE '(^|[ │])--[a-z][a-z0-9.-]*' | tr -d ' │' | sort -u
            )
        fi
        asked=${_cascade_options["$verb $config"]}
    else
        return
    fi
    mapfile -t COMPREPLY < <(compgen -W "$asked" -- "$word")
}

complete -o default -F _cascade cascade
