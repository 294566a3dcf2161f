#!/usr/bin/env bash
# Train on a slice of Cloud TPUs, asked for as a queued resource, and after a preemption on another.
#
#     bash launch/tpu.sh [OPTIONS] ACTION [CONFIG --workdir DIR [--FIELD VALUE ...]]
#
# Actions, one after the other by hand, or all of them by `up`:
#
#     create    ask for the slice
#     wait      until it is there
#     install   the last commit of this checkout, on every worker
#     run       start `cascade train CONFIG ...` on every worker; it goes on without this terminal
#     logs      follow the log of worker 0
#     status    of the slice and of the training, a word each
#     stop      save a checkpoint and stop the training
#     delete    the slice, and its cost
#     up        all that is not done yet of create, wait, install and run; when the slice is
#               preempted, delete it and begin again; delete it when the training is complete
#
# Options:
#
#     --name NAME       of the slice and its request (default cascade)
#     --zone ZONE       (default us-west4-a)
#     --project ID      (default: the one gcloud is set to)
#     --type TYPE       accelerator type (default v5litepod-256)
#     --runtime NAME    software version (default v2-alpha-tpuv5-lite; v6e: v2-alpha-tpuv6e,
#                       v5p: v2-alpha-tpuv5, v4: tpu-ubuntu2204-base)
#     --spot            cheaper, and taken away when somebody pays more
#     --bucket BUCKET   mount a Cloud Storage bucket as `bucket` on every worker, so that
#                       --workdir bucket/runs/base64 outlives the slice
#     --retries N       new slices that `up` asks for at most (default 100)
#     --poll SECONDS    between two looks at the state (default 60)
#     --dry-run         print the commands and run none
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

name=cascade
zone=us-west4-a
project=()
type=v5litepod-256
runtime=v2-alpha-tpuv5-lite
spot=()
bucket=
retries=100
poll=60
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) show_help; exit ;;
        --dry-run) dry_run=true; shift ;;
        --name) name=$(value name "$@"); shift 2 ;;
        --zone) zone=$(value name "$@"); shift 2 ;;
        --project) project=("--project=$(value address "$@")"); shift 2 ;;
        --type) type=$(value name "$@"); shift 2 ;;
        --runtime) runtime=$(value name "$@"); shift 2 ;;
        --spot) spot=(--spot); shift ;;
        --bucket) bucket=$(value name "$@"); shift 2 ;;
        --retries) retries=$(value number "$@"); shift 2 ;;
        --poll) poll=$(value number "$@"); shift 2 ;;
        -*) fail "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || fail "no action; see --help"
action=$1
shift
case "$action" in run | up) check_training "$@" ;; esac

request=(gcloud compute tpus queued-resources)
machines=(gcloud compute tpus tpu-vm)
place=("--zone=$zone" "${project[@]}")

create() {
    run "${request[@]}" create "$name" "--node-id=$name" "--accelerator-type=$type" \
        "--runtime-version=$runtime" "${spot[@]}" "${place[@]}"
}

# ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, FAILED, SUSPENDED ...; nothing when there is none.
slice_state() {
    run "${request[@]}" describe "$name" "--format=value(state.state)" "${place[@]}" || true
}

# Status 0 when the slice is there, 1 when this request will not bring one.
wait_for_slice() {
    local state
    if $dry_run; then
        slice_state
        return
    fi
    while true; do
        state=$(slice_state)
        say "$(date '+%F %T') $name: ${state:-gone}"
        case "$state" in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING | "") return 1 ;;
        esac
        sleep "$poll"
    done
}

on_workers() {
    local which=$1
    shift
    run "${machines[@]}" ssh "$name" "--worker=$which" "${place[@]}" "--command=$*"
}

install() {
    # In a folder of one's own: elsewhere another's link may be in the place of the archive.
    local cache=${XDG_CACHE_HOME:-$HOME/.cache} archive
    archive=$cache/cascade-$name.tar.gz
    run mkdir -p "$cache" &&
        run git -C "$here/.." archive --format=tar.gz "--output=$archive" HEAD &&
        run "${machines[@]}" scp "$archive" "$name:cascade.tar.gz" --worker=all "${place[@]}" &&
        # The workers' own Python may be older than cascade needs; uv brings one.
        on_workers all "set -e; mkdir -p cascade/bucket; tar xzf cascade.tar.gz -C cascade;" \
            "cd cascade; python3 -m pip install --quiet --user uv; PATH=\$HOME/.local/bin:\$PATH;" \
            "uv venv --quiet --clear --python 3.12 venv;" \
            "uv pip install --quiet --python venv/bin/python '.[tpu]'" &&
        mount_bucket
}

mount_bucket() {
    local source=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    [ -n "$bucket" ] || return 0
    on_workers all "set -e; mountpoint -q cascade/bucket && exit;" \
        "curl -fsSL $source/doc/apt-key.gpg | sudo tee $key >/dev/null;" \
        "echo \"deb [signed-by=$key] $source gcsfuse-\$(lsb_release -cs) main\" |" \
        "sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null;" \
        "sudo apt-get -qq update; sudo apt-get -qq install -y gcsfuse;" \
        "gcsfuse --implicit-dirs $(quoted "$bucket") cascade/bucket"
}

# A service of systemd: it outlives the connection, and at a shutdown its main process (KillMode) is
# sent SIGTERM and waited for. single_node.sh starts training again after a crash; the other workers end with it and meet
# it again.
start() {
    on_workers all "sudo systemctl reset-failed cascade 2>/dev/null;" \
        "sudo systemd-run --unit=cascade --uid=\$(id -u) --setenv=HOME=\$HOME" \
        "--setenv=PATH=\$HOME/cascade/venv/bin:\$PATH --working-directory=\$HOME/cascade" \
        "--property=KillMode=mixed --property=TimeoutStopSec=300 bash launch/single_node.sh $(quoted "$@")"
}

# active while training, inactive when it is complete, failed; nothing when the worker is gone.
training_state() {
    on_workers 0 "systemctl is-active cascade || true" || true
}

# Status 0 when training is complete, 1 when the slice is gone, 2 when training has failed.
follow() {
    local training
    while true; do
        training=$(training_state)
        say "$(date '+%F %T') training: ${training:-no answer}"
        case "$training" in
            inactive) return 0 ;;
            failed) return 2 ;;
            active | activating | deactivating) ;;
            *) wait_for_slice || return 1 ;;
        esac
        sleep "$poll"
    done
}

delete() {
    run "${request[@]}" delete "$name" --force --quiet "${place[@]}"
}

up() {
    local slices result
    if $dry_run; then
        create
        slice_state
        install
        start "$@"
        training_state
        delete
        return
    fi
    for ((slices = 0; ; slices++)); do
        [ -n "$(slice_state)" ] || create || return 1
        result=0
        wait_for_slice && prepare "$@" || result=1
        [ "$result" != 0 ] || follow || result=$?
        case $result in
            0)
                say "training is complete"
                delete
                return 0
                ;;
            2)
                say "training failed; the slice is kept: look at \`logs\`, then \`delete\`"
                return 1
                ;;
        esac
        say "the slice was lost, or never came"
        delete || true
        [ "$slices" -lt "$retries" ] || return 1
        sleep "$poll"
    done
}

# A slice that trains already (from an earlier `up`, whose terminal was closed) is only followed.
prepare() {
    [ "$(training_state)" = active ] || { install && start "$@"; }
}

case "$action" in
    create) create ;;
    wait) wait_for_slice || fail "$name: the request brought no slice; delete it and create again" ;;
    install) install ;;
    run) start "$@" ;;
    logs) on_workers 0 "journalctl --unit=cascade --output=cat --follow --lines=200" ;;
    status) slice_state; training_state ;;
    stop) on_workers all "sudo systemctl stop cascade" ;;
    delete) delete ;;
    up) up "$@" ;;
    *) fail "unknown action $action; see --help" ;;
esac
