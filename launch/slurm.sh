#!/usr/bin/env bash
# Train on GPUs of a SLURM cluster: one process for each GPU, queued again after a preemption.
#
#     bash launch/slurm.sh [OPTIONS] CONFIG --workdir DIR [--FIELD VALUE ...]
#
# Run it on a login node, where `cascade` is on PATH; DIR and this folder must lie on storage that
# the nodes share. The rest of the line goes to `cascade train`.
#
#     --nodes N         machines (default 1)
#     --gpus N          GPUs, and so processes, on each (default 8)
#     --time TIME       time limit of one stay in the queue (default 24:00:00); reached, the job
#                       saves and queues again
#     --retries N       queue again after N preemptions, time limits and crashes (default 100)
#     --name NAME       of the job (default cascade)
#     --sbatch OPTION   any option of sbatch, such as --partition=gpu; may be repeated
#     --dry-run         print the commands, here and in the job, and run none
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

nodes=1
gpus=8
time=24:00:00
retries=100
name=cascade
more=()
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) show_help; exit ;;
        --dry-run) dry_run=true; shift ;;
        --nodes) nodes=$(value count "$@"); shift 2 ;;
        --gpus) gpus=$(value count "$@"); shift 2 ;;
        --time) time=$(value time "$@"); shift 2 ;;
        --retries) retries=$(value number "$@"); shift 2 ;;
        --name) name=$(value name "$@"); shift 2 ;;
        --sbatch) more+=("$(value sbatch "$@")"); shift 2 ;;
        *) break ;;
    esac
done
check_training "$@"

# sbatch runs a copy of the job from a folder of its own: hence the path of this one.
export CASCADE_LAUNCH=$here CASCADE_RETRIES=$retries
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --time="$time" --requeue --signal=B:TERM@300 --open-mode=append \
    --output="$name-%j.log" --export=ALL "${more[@]}" "$here/slurm.sbatch" "$@"
if $dry_run; then
    CASCADE_DRY_RUN=true bash "$here/slurm.sbatch" "$@"
fi
