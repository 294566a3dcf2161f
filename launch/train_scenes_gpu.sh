#!/usr/bin/env bash
# Train a cascade of scenes from nothing in minutes, on one GPU.
#
#     bash launch/train_scenes_gpu.sh RUNS [--minutes M] [WORDS]
#
# RUNS       folder of the runs; RUNS/model is the model, RUNS/parts/ the same as an archive in parts
#            of 15 MB, for where larger files cannot be sent:
#            cat RUNS/parts/* | tar -x
# --minutes  for all of it but the start of Python and the export, 8 if not given
# WORDS      go to every `cascade train`, as --batch-size 8
#
# The text encoder is the one that ships. The base model trains all the time; the super-resolution
# models train beside it, one after the other, for .45 and .25 of the time, so that neither compiling
# nor one model's small layers leave the GPU idle.
set -euo pipefail
case ${1:---help} in -*) sed -n 's/^# \{0,1\}//p' "$0" | sed 1d && exit ;; esac
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh
runs=$1 && shift
minutes=8
if [ "${1:-}" = --minutes ]; then minutes=$(value minutes "$@"); shift 2; fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.45}
cascade=${CASCADE:-cascade}

train() { # NAME SHARE [WORDS]
    $cascade train "configs/scenes/gpu/$1.py" --workdir "$runs/$1" \
        --minutes "$(awk "BEGIN { print $minutes * $2 }")" "${@:3}" 2> "$runs/$1.log" ||
        { tail -n 3 "$runs/$1.log" >&2 && return 1; }
}

mkdir -p "$runs"
train base64 1 "$@" &
base=$!
trap 'kill $base 2> /dev/null || true' EXIT
train sr256 .45 "$@"
train sr1024 .25 "$@"
wait $base
$cascade export "$runs/base64" "$runs/sr256" "$runs/sr1024" "$runs/model" \
    --dtype float16 --compute-dtype float32
mkdir -p "$runs/parts"
tar -cf - -C "$runs" model | split -b 15M - "$runs/parts/model.tar."
