"""What a sheet of previews shows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from PIL import Image
from written import pairs, records

from cascade import images, testing
from cascade.data import FolderData
from cascade.data.source import BadRecord
from cascade.devices import sharding
from cascade.stage import Stage
from cascade.training import preview
from cascade.training.stage_training import StageTraining, first_captions


def test_a_preview_shows_small_drawn_and_true():
    class Drawer(Stage):
        def sample(self, params, given, keys, *, sides, **_):
            return jnp.full((len(keys), *sides, 3), 1.0)

    encoder = testing.FakeEncoder()
    text = encoder(["red"] * 6)
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    batch = {"lowres": small, "text": text.values, "text_mask": text.mask}
    batch["image"] = 255 - small.repeat(2, 1).repeat(2, 2)
    got = preview.draw(Drawer(testing.super_resolution_stage()), {}, batch, [], encoder)
    low = images.to_uint8(images.upsample(images.to_float(batch["lowres"][:4]), (16, 16)))
    for i in range(4):
        row = got[18 * i : 18 * i + 16]
        np.testing.assert_array_equal(row[:, :16], low[i])
        assert (row[:, 18:34] == 255).all()
        np.testing.assert_array_equal(row[:, 36:52], batch["image"][i])


def test_a_base_stage_draws_the_pictures_captions_and_then_the_prompts_given(tmp_path):
    job = StageTraining(
        stage=dataclasses.replace(testing.smallest_stage(), conditions=()),
        data=pairs(tmp_path / "d", records(4)),
        images=8,
        batch_size=8,
        preview_captions=2,
        preview_prompts=("new", "old"),
    )
    mesh = sharding.make_mesh(job.mesh)

    def prompts(**changes):
        return dataclasses.replace(job, **changes).open(mesh, tmp_path)._prompts

    assert prompts() == ["0", "1", "new", "old"]
    assert prompts(preview_captions=0) == prompts(preview_every_images=0) == ["new", "old"]
    assert prompts(stage=testing.super_resolution_stage(8, 128)) == ["new", "old"]


def test_the_first_captions_that_differ_are_previewed(tmp_path):
    """Without those that cannot be read."""
    for i, caption in enumerate(("a cat", "a cat", "", "a dog", "a cow")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    source = FolderData(path=str(tmp_path)).open(8)
    there = source.captions_of

    def damaged(index):
        if index == 3:
            raise BadRecord("3.png: gone", "3.png", "gone")
        return there(index)

    source.captions_of = damaged
    assert first_captions(source, 3) == ["a cat", "", "a cow"]
    assert first_captions(source, 2) == ["a cat", ""]
    assert first_captions(source, 9) == ["a cat", "", "a cow"]
    assert first_captions(source, 0) == []
