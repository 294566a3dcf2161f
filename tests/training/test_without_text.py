"""A stage that reads no text: trained on what its data's examples hold besides captions."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_folders import model_folder

from cascade import testing
from cascade.commands.export import export
from cascade.data import Data, Source, batches
from cascade.errors import UserError
from cascade.models.layers import Linear
from cascade.models.signals import Signals, Widths
from cascade.runner.cascade import Cascade
from cascade.stage import Condition, Sampling
from cascade.storage.checkpoint import Checkpoints
from cascade.training.job import Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining


class Shades(Source):
    """Pictures of one grey each, and how light it is as a number beside them."""

    def __init__(self, resolution):
        self.resolution = resolution

    def __len__(self):
        return 8

    def __getitem__(self, index):
        picture = np.full((self.resolution, self.resolution, 3), 32 * index, np.uint8)
        return {"image": picture, "caption": f"grey {index}", "light": np.float32([index])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShadesData(Data):
    def open(self, resolution):
        return Shades(resolution)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Light(Condition):
    """The number beside the picture; of a prompt, its last word."""

    name: ClassVar[str] = "light"

    def widths(self, network):
        return Widths()

    def build(self, network, *, rngs):
        return _Light(network.embedding_width, rngs)

    def shapes(self, space, b, tokens, crop):
        return {"light": jax.ShapeDtypeStruct((b, 1), jnp.float32)}

    def of_batch(self, batch, keys, part, shape):
        return self.of_examples(batch)

    def of_examples(self, batch):
        return (batch["light"],)

    def of_prompts(self, prompts, embed):
        return (jnp.array([[float(prompt.split()[-1])] for prompt in prompts]),)


class _Light(nnx.Module):
    def __init__(self, width, rngs):
        self.linear = Linear(1, width, rngs=rngs)

    def __call__(self, light):
        return Signals(vectors=(self.linear(light),))


def textless():
    """The smallest network, for it is not what is tested; guided, so that what stands in for the
    number where there is none is drawn with too."""
    sampling = Sampling(steps=3, guidance=2.0)
    stage = testing.smallest_stage(text_width=0)
    return dataclasses.replace(stage, conditions=(Light(),), sampling=sampling)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, whose text encoder is nowhere."""
    workdir = tmp_path_factory.mktemp("textless") / "run"
    job = StageTraining(
        stage=textless(),
        data=ShadesData(),
        text_encoder="/nowhere",
        images=32,
        batch_size=8,
        optimizer=Optimizer(learning_rate=1e-2),
        preview_prompts=("grey 1", "grey 7"),
        preview_every_images=32,
    )
    assert fit(job, workdir)
    return workdir


def test_what_else_an_example_holds_is_in_the_batch():
    found = batches(ShadesData().open(8), batch_size=4, seed=0, tokenizer=None)
    batch = next(found)
    found.close()
    assert set(batch) == {"image", "light"}
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 32 * batch["light"][:, 0])


def test_it_trains_previews_and_draws_without_any_text_encoder(run, tmp_path):
    assert len(list((run / "previews").iterdir())) == 1
    export([run], tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        *("SHA256SUMS", "base8", "config.json")
    ]
    drawn = Cascade.load(tmp_path / "model")(["grey 1", "grey 90"])
    assert not np.array_equal(drawn[0].images[8], drawn[1].images[8])


def test_beside_stages_that_read_text_it_is_exported_with_their_encoder(run, tmp_path):
    """The trained base is without text; the super-resolution stage of --rest reads it."""
    above = testing.super_resolution_stage(text_width=128)
    rest = model_folder(tmp_path / "rest", above, max_tokens=9)
    report = export([run], tmp_path / "model", rest=str(rest))
    assert report["stages"] == ["base8", above.name] and report["max_tokens"] == 9
    assert (tmp_path / "model/text_encoder/config.json").is_file()
    assert set(Cascade.load(tmp_path / "model")("grey 1")[0].images) == {8, 16}


def test_weights_that_are_not_those_of_the_config_are_not_exported(run, tmp_path, monkeypatch):
    restore = Checkpoints.restore_ema

    def of_another_width(self):
        step, weights, saved = restore(self)
        saved["stage"]["network"]["levels"][0]["width"] = 24
        return step, weights, saved

    monkeypatch.setattr(Checkpoints, "restore_ema", of_another_width)
    with pytest.raises(UserError, match="its weights are not those of a stage as its config says"):
        export([run], tmp_path / "model")
    assert not (tmp_path / "model").exists()
