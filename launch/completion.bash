# Completion of `cascade` in bash, and in zsh after `autoload bashcompinit && bashcompinit`:
#
#     source launch/completion.bash
#
# Verbs, options and those of their values that form a list are what `cascade --help` and `cascade
# VERB --help` tell of; other words are completed as names of files.
# shellcheck shell=bash
declare -A _cascade_help

_cascade() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} asked
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        asked=$(cascade --help 2>/dev/null | sed -n 's/^  \([a-z]\+\) .*/\1/p')
    elif ((COMP_CWORD == 2)) && [[ ${COMP_WORDS[1]} =~ ^(data|eval|convert|bench)$ && $word != -* ]]; then
        asked=$(
            cascade "${COMP_WORDS[1]}" --help 2>/dev/null |
                grep -oE "^  [a-z]+  |cascade ${COMP_WORDS[1]} [a-z]+" | awk '{ print $NF }' | sort -u
        )
    elif [[ $word == -* || $before == --* ]]; then
        local verb=${COMP_WORDS[1]} config=
        case $verb in
            train | data | eval | convert | bench) config=${COMP_WORDS[2]#-*} ;;
        esac
        if [[ -z ${_cascade_help["$verb $config"]} ]]; then
            _cascade_help["$verb $config"]=$(cascade "$verb" ${config:+"$config"} --help 2>/dev/null)
        fi
        if [[ $word == -* ]]; then
            asked=$(
                grep -oE '(^|[ │])--[a-z][a-z0-9.-]*' <<<"${_cascade_help["$verb $config"]}" |
                    tr -d ' │' | sort -u
            )
        else
            asked=$(
                grep -oE -- "$before \{[^}]*\}" <<<"${_cascade_help["$verb $config"]}" |
                    sed 's/.*{//; s/}//' | tr , ' '
            )
        fi
    else
        return
    fi
    mapfile -t COMPREPLY < <(compgen -W "$asked" -- "$word")
}

complete -o default -F _cascade cascade
