"""GLIDE's inpainting: a stage that is told what stays of a picture, and where the hole is.

Nichol et al. 2022 ("GLIDE"), sec. 2.4, fine-tune a trained model on pictures with random holes. Its
input gets four more channels, the picture outside the hole and the hole itself, with weights that
begin at zero: what it draws at first is what it drew before. It then sees what is around a hole
from the first step on, where replacement alone (`cascade.runner.edits`) shows it noise.

    cascade train configs/inpaint/base64.py --workdir runs/inpaint     # from `scenes`, minutes
    cascade export runs/inpaint models/inpaint --rest scenes
    cascade sample "a red circle" --init-image photo.png --mask hole.png --model models/inpaint

`hole.py` has the condition, `training.py` the job.
"""
