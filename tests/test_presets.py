"""configs/imagen: the numbers of the paper, and sizes by shapes alone."""

import math
from pathlib import Path

import jax
import pytest

from cascade import config
from cascade.diffusion.process import Cosine, LinearVP
from cascade.diffusion.samplers import Ancestral
from cascade.stage import Stage

FOLDER = Path(__file__).parent.parent / "configs" / "imagen"
PAPER = ["base64", "sr256", "sr1024"]


def load(name):
    return config.load(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize(
    "name, millions",
    [
        ("base64", (1900, 2400)),  # "2B"
        ("sr256", (570, 620)),  # "600M"
        ("sr1024", (570, 580)),  # "400M", which its printed list of blocks does not give
        ("base64_300m", (270, 330)),
        ("base64_mini", (100, 200)),
    ],
)
def test_parameters_are_as_many_as_announced(name, millions):
    parameters = Stage(load(name).stage).abstract()
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    assert millions[0] < count / 1e6 < millions[1]
    announced = (FOLDER / f"{name}.py").read_text().splitlines()[0]
    assert str(round(count / 1e6)) in announced or f"{count / 1e9:.2f} billion" in announced


@pytest.mark.parametrize("name", PAPER)
def test_training_follows_appendix_f(name):
    run = load(name)
    stage, optimizer = run.stage, run.optimizer
    assert (run.batch_size, run.steps) == (2048, 2_500_000)
    assert optimizer.name == ("adafactor" if name == "base64" else "adam")
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-4, 0.0)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert optimizer.warmup_images == 10_000 * 2048
    assert (stage.prediction, stage.loss.space, stage.loss.weighting) == ("eps", "eps", "plain")
    assert stage.schedule == (LinearVP() if name == "sr1024" else Cosine())
    assert stage.text.dropout == 0.1 and stage.network.dropout == 0.0
    assert stage.text.width == 4096 and run.text_encoder == "google/t5-v1_1-xxl"
    assert run.crop == (256 if name == "sr1024" else None)
    assert isinstance(stage.sampling.sampler, Ancestral)
    assert stage.sampling.threshold.kind == "dynamic"
    assert stage.sampling.threshold.percentile == 0.995


def test_the_base_network_is_that_of_appendix_f():
    network = load("base64").stage.network
    assert [level.width for level in network.levels] == [512 * m for m in (1, 2, 3, 4)]
    assert [level.attention for level in network.levels] == [False, True, True, True]
    assert {level.blocks for level in network.levels} == {3} and network.head_width == 64


@pytest.mark.parametrize("name", ["sr256", "sr1024"])
def test_the_super_resolution_networks_are_those_of_appendix_b(name):
    levels = load(name).stage.network.levels
    assert [level.width for level in levels] == [128, 256, 512, 1024]
    assert [level.blocks for level in levels] == [2, 4, 8, 8]
    assert [level.stride for level in levels] == [2] * 4
    assert [level.text_attention for level in levels] == [False, False, False, True]
    # Trained on crops, the last one must not see how large its picture is.
    assert [level.self_attention for level in levels] == [False] * 3 + [name == "sr256"]
    assert levels[-1].width // load(name).stage.network.head_width == 8


def test_the_stages_make_a_cascade():
    base, middle, top = (load(name).stage for name in PAPER)
    assert middle.lowres_resolution == base.resolution == 64
    assert top.lowres_resolution == middle.resolution == 256 and top.resolution == 1024
