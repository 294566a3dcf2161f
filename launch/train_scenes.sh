#!/usr/bin/env bash
# Train the cascade that ships, from nothing: the text encoder, then the three stages, then export.
#
#     bash launch/train_scenes.sh [RUNS]        RUNS: folder of the runs, default runs/scenes
#
# Stop it whenever you like and start it again: every part continues from its last checkpoint, and
# parts that are done take seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/scenes}

cascade train configs/scenes/text_encoder.py --workdir "$runs/text_encoder"
for stage in base64 sr256 sr1024; do
    cascade train "configs/scenes/$stage.py" --workdir "$runs/$stage" \
        --text-encoder "$runs/text_encoder/text_encoder"
done
if [ ! -e "$runs/model" ]; then
    cascade export "$runs/base64" "$runs/sr256" "$runs/sr1024" "$runs/model" --dtype float16
fi
cascade sample "a small red circle above a big blue square on gray" \
    --model "$runs/model" --out "$runs/samples"
