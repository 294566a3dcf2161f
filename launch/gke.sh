#!/usr/bin/env bash
# Train on TPU slices of a Kubernetes cluster (GKE) that has the JobSet controller.
#
#     bash launch/gke.sh [OPTIONS] ACTION [CONFIG --workdir DIR [--FIELD VALUE ...]]
#
# Actions:
#
#     build     the image of this checkout, and push it
#     apply     start `cascade train CONFIG ...` on every host of every slice
#     wait      until the training is complete
#     logs      follow the log of the first host
#     status    of the JobSet and its pods
#     delete    the JobSet and its pods; checkpoints stay
#
# Options:
#
#     --name NAME            of the JobSet (default cascade)
#     --image IMAGE          to build or run, such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/cascade
#     --accelerator NAME     of the nodes (default tpu-v5-lite-podslice)
#     --topology AxB[xC]     of one slice (default 16x16)
#     --chips N              on each host (default 4)
#     --slices N             (default 1)
#     --bucket BUCKET        Cloud Storage bucket, which pods see as /bucket: --workdir /bucket/...
#     --service-account NAME of Kubernetes, allowed to use the bucket (default default)
#     --retries N            restarts after preemptions and crashes (default 100)
#     --dry-run              print the commands and run none
#
# When one pod is lost, the JobSet starts all of them anew, and the same command resumes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

name=cascade
image=
accelerator=tpu-v5-lite-podslice
topology=16x16
chips=4
slices=1
bucket=
account=default
retries=100
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) show_help; exit ;;
        --dry-run) dry_run=true; shift ;;
        --name) name=$(value name "$@"); shift 2 ;;
        --image) image=$(value address "$@"); shift 2 ;;
        --accelerator) accelerator=$(value name "$@"); shift 2 ;;
        --topology) topology=$(value topology "$@"); shift 2 ;;
        --chips) chips=$(value count "$@"); shift 2 ;;
        --slices) slices=$(value count "$@"); shift 2 ;;
        --bucket) bucket=$(value name "$@"); shift 2 ;;
        --service-account) account=$(value name "$@"); shift 2 ;;
        --retries) retries=$(value number "$@"); shift 2 ;;
        -*) fail "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || fail "no action; see --help"
action=$1
shift

# "a", "b": words as the inside of a JSON list, which is YAML too.
json_words() {
    local word list=
    for word in "$@"; do
        word=${word//\\/\\\\} word=${word//\"/\\\"}
        word=${word//$'\n'/\\n} word=${word//$'\r'/\\r} word=${word//$'\t'/\\t}
        [[ ! $word =~ [[:cntrl:]] ]] || fail "${word@Q} has a control character; write it without"
        list+=", \"$word\""
    done
    printf '%s' "${list#, }"
}

# The template with its ${NAMES} filled in. Only these are: nothing in it is evaluated.
render() {
    local text hosts pair words
    hosts=$((${topology//x/*} / chips))
    ((hosts * chips == ${topology//x/*})) ||
        fail "--chips must divide the chips of --topology $topology, got $chips"
    text=$(<"$here/gke/jobset.yaml")
    for pair in "NAME=$name" "IMAGE=$image" "ACCELERATOR=$accelerator" "TOPOLOGY=$topology" \
        "CHIPS=$chips" "HOSTS=$hosts" "SLICES=$slices" "BUCKET=$bucket" "ACCOUNT=$account" \
        "RETRIES=$retries"; do
        text=${text//"\${${pair%%=*}}"/"${pair#*=}"}
    done
    words=$(json_words "$@") || exit
    text=${text/"\"\${ARGUMENTS}\""/"$words"}
    printf '%s\n' "$text"
}

apply() {
    local manifest
    check_training "$@"
    [ -n "$image" ] || fail "--image is missing: what \`build\` pushed"
    [ -n "$bucket" ] || fail "--bucket is missing: pods have no other place that outlives them"
    manifest=$(render "$@")
    if $dry_run; then
        printf "kubectl apply --filename - <<'END'\n%s\nEND\n" "$manifest"
    else
        kubectl apply --filename - <<<"$manifest"
    fi
}

build() {
    [ -n "$image" ] || fail "--image is missing: the name to build and push"
    run docker build --file "$here/gke/Dockerfile" --tag "$image" "$here/.."
    run docker push "$image"
}

case "$action" in
    build) build ;;
    apply) apply "$@" ;;
    wait) run kubectl wait --for=condition=Completed --timeout=-1s "jobset/$name" ;;
    logs)
        run kubectl logs --follow --tail=200 --selector \
            "jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        ;;
    status) run kubectl get jobset,pods --selector "jobset.sigs.k8s.io/jobset-name=$name" ;;
    delete) run kubectl delete jobset "$name" ;;
    *) fail "unknown action $action; see --help" ;;
esac
