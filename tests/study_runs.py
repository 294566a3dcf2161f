"""Folders as `cascade sample` writes them, of pictures that tell by their colour which run's they
are: run "a" draws red ones, run "b" blue ones."""

import json

import numpy as np

from cascade import images

SECRETS = ("secret-model-a", "secret-model-b")
"""What the runs' JSON files and PNGs say of who drew them."""


def write_run(folder, run, prompts, *, sides=(8,), categories=None, shape=None):
    """A picture of each prompt, in turn. shape: of files (height, width) other than their side."""
    folder.mkdir(parents=True)
    for number, prompt in enumerate(prompts):
        record = {"prompt": prompt, "seed": 4242 + number, "model": SECRETS["ab".index(run)]}
        if categories is not None:
            record["category"] = categories[number]
        (folder / f"{number:04d}.json").write_text(json.dumps(record))
        for side in sides:
            picture = np.zeros((*(shape or (side, side)), 3), np.uint8)
            picture[..., 1] = np.arange(picture.shape[1])  # so that no two sizes look alike
            picture[..., {"a": 0, "b": 2}[run]] = 200
            picture[0, 0, 1] = number
            text = {k: str(v) for k, v in record.items()}
            images.save_png(folder / f"{number:04d}_{side}.png", picture, text)
    return folder


def run_of(picture):
    """(run, number) of a picture that `write_run` has made."""
    pixel = np.asarray(picture)[0, 0]
    return ("a" if pixel[0] > pixel[2] else "b"), int(pixel[1])
