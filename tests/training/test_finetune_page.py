"""FINETUNE.md is run as it stands there, from the folder to samples, on a small model."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from model_folders import model_folder
from PIL import Image

from cascade import Cascade, cli, testing
from cascade.config import read_json
from cascade.data import Mixture
from cascade.training.loop import saved_job
from cascade.training.trainable import Weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "FINETUNE.md").read_text().split("\n## How well")[0]
SMALLER = {
    "configs/finetune.py": (
        "--images 32 --batch-size 16 --log-every-images 16 --optimizer.warmup-images 0"
        " --preview-every-images 32"
    ),
    "configs/text_encoder_own.py": (
        "--images 64 --batch-size 16 --warmup-images 0 --length 32 --encoder.num-layers 1"
        " --encoder.num-decoder-layers 1 --encoder.d-ff 16"
    ),
    "configs/tiny/base64.py": (
        "--images 16 --batch-size 8 --preview-every-images 0 --optimizer.cooldown-images 0"
        " --stage.space.resolution 16"
    ),
}
"""What the test adds to the commands of the page, by their config."""


def blocks():
    """("python", its source) or ("cascade", the words of a command), in the order of the page."""
    either = r"```python\n(?P<code>[^`]*)```|(?P<lines>(?:^    .*\n)+)"
    for block in re.finditer(either, PAGE, re.MULTILINE):
        if block["code"] is not None:
            yield "python", block["code"]
        else:
            lines = block["lines"].replace("\\\n", " ").strip().splitlines()
            yield from (("cascade", shlex.split(line)[1:]) for line in lines)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder in which everything was done, and what the commands printed."""
    folder = tmp_path_factory.mktemp("page")
    stages = testing.smallest_stage(128), testing.super_resolution_stage(8, 128)
    model_folder(folder / "small", *stages)
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        alone = jax.devices()[:1]
        patched.setattr(jax, "devices", lambda *_: alone)
        for kind, what in blocks():
            if kind == "python":
                exec(what.replace("range(100)", "range(8)"), {"__name__": __name__})
                continue
            words = [{"scenes": "small", "64": "8"}.get(word, word) for word in what]
            if words[0] == "train":
                words += SMALLER[words[1]].split()
            if words[0] == "sample":
                words += ["--steps", "2", "--no-compilation-cache"]
            cli.main(words)
        yield folder


def job_in(folder):
    return saved_job(read_json(folder / "config.json"), str(folder))


def test_the_page_leads_from_a_folder_to_samples(followed):
    names = {f"{number:04d}_8.png" for number in (0, 1)}
    assert names <= {file.name for file in (followed / "samples").iterdir()}
    assert Cascade.load(followed / "mine").stages[1][0].config.name == "sr16"
    with Image.open(followed / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 10


def test_its_previews_are_of_the_pictures_captions_and_of_the_prompts_given(followed):
    """Four of the one and two of the other, in a sheet of 3 x 2 pictures."""
    job = job_in(followed / "runs/mine")
    assert (job.preview_captions, len(job.preview_prompts)) == (4, 2)
    (sheet,) = (followed / "runs/mine/previews").iterdir()
    with Image.open(sheet) as drawn:
        assert drawn.size == (3 * 8 + 2 * 2, 2 * 8 + 2)


def test_its_prior_set_is_drawn_by_the_model_and_mixed_in_in_equal_parts(followed):
    prompts = (followed / "class.txt").read_text().splitlines()
    drawn = [json.loads(file.read_text()) for file in sorted((followed / "prior").glob("*.json"))]
    assert [one["prompt"] for one in drawn] == prompts
    job = job_in(followed / "runs/both")
    assert isinstance(job.data, Mixture) and job.data.weights == (1.0, 1.0)
    assert job.trainable == Weights()
    source = dataclasses.replace(job.data).open(8)
    assert [size for size, _ in source.parts] == [20, len(drawn)]


def test_its_encoder_of_ones_own_knows_the_captions_words(followed):
    own = Cascade.load(followed / "own")
    assert len(own.encoder.tokenizer.pieces("framed")) == 1
    assert (followed / "own_samples/0000_16.png").exists()
