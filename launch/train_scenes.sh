#!/usr/bin/env bash
# Train the cascade that ships, from nothing: the text encoder, then the three stages, then export.
#
#     bash launch/train_scenes.sh [RUNS]        RUNS: folder of the runs, default runs/scenes
#
# Stop it whenever you like and start it again: every part continues from its last checkpoint, and
# parts that are done take seconds.
set -euo pipefail
case ${1:-} in -*) sed -n 's/^# \{0,1\}//p' "$0" | sed 1d && exit ;; esac
cd "$(dirname "$0")/.."
runs=${1:-runs/scenes}

train() { # NAME [WORDS]: the config and the run of that name
    cascade train "configs/scenes/$1.py" --workdir "$runs/$1" \
        --text-encoder "$runs/text_encoder/text_encoder" "${@:2}"
}

cascade train configs/scenes/text_encoder.py --workdir "$runs/text_encoder"
train base64_closeup
if [ ! -e "$runs/closeup_model" ]; then
    cascade export "$runs/base64_closeup" "$runs/closeup_model"
fi
train base64_pairs --init "$runs/closeup_model"
if [ ! -e "$runs/pairs_model" ]; then
    cascade export "$runs/base64_pairs" "$runs/pairs_model"
fi
train base64_layout --init "$runs/pairs_model"
if [ ! -e "$runs/layout_model" ]; then
    cascade export "$runs/base64_layout" "$runs/layout_model"
fi
train base64 --init "$runs/layout_model"
train sr256_pairs
if [ ! -e "$runs/sr_pairs_model" ]; then
    cascade export "$runs/sr256_pairs" "$runs/sr_pairs_model"
fi
train sr256 --init "$runs/sr_pairs_model"
train sr1024
if [ ! -e "$runs/model" ]; then
    cascade export "$runs/base64" "$runs/sr256" "$runs/sr1024" "$runs/model" --dtype float16
fi
cascade sample "a small red circle above a big blue square on gray" \
    --model "$runs/model" --out "$runs/samples"
if [ ! -e "$runs/report" ]; then
    cascade eval scenes --model "$runs/model" --set all --prompts 100 --out "$runs/report"
fi
