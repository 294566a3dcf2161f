"""Notebooks show what they say they show; test_end_to_end.py executes the third."""

import json

import pytest
from notebooks import executed, pictures

from cascade import Cascade, images
from cascade.commands.export import export
from cascade.scenes.captions import caption_at
from cascade.scenes.dataset import ScenesData
from cascade.scenes.judge import judge


def test_the_first_notebook_draws_a_picture_and_trains_a_model(tmp_path):
    notebook = executed("first_picture", "tiny_images, num, until = 160, 1, 64", tmp_path)
    assert pictures(notebook) >= 9
    rows = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["images"] == 160


@pytest.mark.long
def test_the_first_notebook_trains_a_model_that_draws_the_prompt_far_above_chance(tmp_path):
    """Chance is what the same pictures show of other prompts, the next three of each."""
    notebook = executed("first_picture", "tiny_images, num, until = 4_000, 1, 64", tmp_path)
    assert pictures(notebook) >= 9
    export([tmp_path / "runs/tiny"], tmp_path / "model")
    said = [caption_at(0, i, "seen", max_objects=1)[1] for i in range(64)]
    drawn = Cascade.load(tmp_path / "model")([caption.text for caption in said])

    def share(shift):
        verdicts = [
            verdict.right
            for i, picture in enumerate(drawn)
            for verdict in judge(picture.images[64], said[(i + shift) % len(said)].facts)
        ]
        return sum(verdicts) / len(verdicts)

    chance = (share(1) + share(2) + share(3)) / 3
    assert share(0) > 0.15 and share(0) > 1.5 * chance


def test_the_notebook_of_ones_own_pictures_reads_a_folder_and_says_what_it_left_out(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    scenes = ScenesData(max_objects=1).open(64)
    for i in range(20):
        images.save_png(mine / f"{i}.png", scenes[i]["image"])
        (mine / f"{i}.txt").write_text(f"mine: {scenes[i]['caption']}")
    (mine / "7.png").write_bytes(b"no picture")
    notebook = executed("own_pictures", "pictures, images_seen = 'mine', 32", tmp_path)
    assert pictures(notebook) == 1 + 1 + 2 + 1  # a sheet, the curve, previews, what it draws
    said = [o.text for c in notebook.cells for o in c.get("outputs", ()) if "text" in o]
    assert any('"key": "7.png"' in text for text in said)
    assert any("mine: " in text for text in said)
