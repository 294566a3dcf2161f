#!/usr/bin/env bash
# Kill, damage and fill up for as long as you like, and count what was lost.
#
#     bash launch/soak.sh DIR [--minutes M] [--seed S]
#
# DIR        a folder to work in, made if it is missing; it may be removed afterwards
# --minutes  how long, 60 if not given
# --seed     decides the moments, sizes and mutations, 0 if not given
#
# Trainings, exports and datasets in the making are killed at random moments, the first compilation
# among them, and begun again: each must end with the bits of one that nobody touched. They also run
# onto small disks (in a mount namespace of their own, where the system allows that). Meanwhile
# files of models, text encoders, datasets and runs are mutated: each must open, or be refused in
# a line. The counts are JSON on stdout; the status is 1 if anything was lost, ended in a traceback
# or hung.
set -euo pipefail
case ${1:---help} in -*) sed -n 's/^# \{0,1\}//p' "$0" | sed 1d && exit ;; esac
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh
folder=$1 && shift
minutes=60 seed=0
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=$(value minutes "$@") ;;
        --seed) seed=$(value number "$@") ;;
        *) fail "no option ${1@Q}; see --help" ;;
    esac
    shift 2
done
exec python tests/soak.py "$folder" "$minutes" "$seed"
