#!/usr/bin/env bash
# Train on one machine, and after a crash go on from the last checkpoint.
#
#     bash launch/single_node.sh [OPTIONS] CONFIG --workdir DIR [--FIELD VALUE ...]
#
# The rest of the line goes to `cascade train`, which finds all devices of the machine by itself.
#
#     --retries N     start again after N crashes at most (default 100)
#     --wait SECONDS  before each new start (default 30)
#     --dry-run       print the command that would run, and nothing else
#
# SIGTERM (a spot machine that is being taken away) and Ctrl-C let cascade save a checkpoint first;
# the same line then goes on from there. Exit status: 0 when the training is complete, 143 when it
# was stopped, 2 at once for a mistake in the command, otherwise that of the last crash. A training
# that stops because another of its hosts was told to counts as a crash, and is started again.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"

retries=100
wait=30
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) show_help; exit ;;
        --dry-run) dry_run=true; shift ;;
        --retries) retries=$(value number "$@"); shift 2 ;;
        --wait) wait=$(value number "$@"); shift 2 ;;
        *) break ;;
    esac
done
check_training "$@"

if $dry_run; then
    run cascade train "$@"
    exit
fi

child=
stopped=false
# Passes a signal on, once: a second one would end cascade before it has saved. In a step of SLURM,
# which signals every process by itself, not at all.
stop() {
    if ! $stopped && [ -n "$child" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
        kill -TERM "$child" 2>/dev/null || true
    fi
    stopped=true
}
trap stop TERM INT

# Runs a command in the background, where a signal reaches this script at once, until it has ended.
attend() {
    "$@" &
    child=$!
    # A signal ends `wait`, but not the child, which is still saving.
    while true; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=
    if $stopped; then
        say "stopped; the same command goes on"
        exit 143
    fi
}

for ((crashes = 0; ; crashes++)); do
    attend cascade train "$@"
    case $status in 0 | 2) exit "$status" ;; esac
    [ "$crashes" -lt "$retries" ] || exit "$status"
    say "cascade ended with status $status; crash $((crashes + 1)), of $retries allowed; again in $wait s"
    attend sleep "$wait"
done
