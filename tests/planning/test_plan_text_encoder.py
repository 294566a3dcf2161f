"""What a plan says of the text encoder of a run, and of one that has a store in its place."""

import dataclasses
import math
import pathlib

import jax
import pytest

from cascade import testing
from cascade.devices.chips import chip_named
from cascade.devices.sharding import MeshConfig
from cascade.planning.figures import table
from cascade.planning.text_encoder import SIZES
from cascade.planning.topology import Topology
from cascade.planning.training import plan_training
from cascade.scenes.dataset import ScenesData
from cascade.text.t5 import T5Encoder
from cascade.training.stage_training import StageTraining

CONFIG = StageTraining(stage=testing.smallest_stage(), data=ScenesData(), images=64, batch_size=16)
TOKENS = 12
GPUS = Topology("h100", chip_named("h100"), 8, None)


def planned(**changes):
    return plan_training(dataclasses.replace(CONFIG, **changes), GPUS, tokens=TOKENS)


def test_an_encoder_adds_its_weights_and_its_work_to_a_step():
    got = planned()
    own = got["text_encoder"]
    encoder = T5Encoder.load("scenes")
    leaves = jax.tree.leaves(encoder.params)
    assert own["parameters"] == sum(leaf.size for leaf in leaves)
    assert own["weight_bytes"] == sum(leaf.nbytes for leaf in leaves)
    assert own["peak_bytes"] == got["peak_bytes"] + own["weight_bytes"]
    # Two FLOPs for each weight of the layers and each token, and attention's two products.
    c = encoder.config
    layer = 4 * c.d_model * c.num_heads * c.d_kv + 3 * c.d_model * c.d_ff
    attention = 2 * TOKENS * c.num_heads * c.d_kv
    work = 2 * 16 * TOKENS * c.num_layers * (layer + attention)
    assert math.isclose(own["flops"], work, rel_tol=0.05)
    slowest = max(own[f"{name}_seconds"] for name in ("compute", "memory", "interconnect"))
    assert math.isclose(own["bound_seconds"], got["bound_seconds"] + slowest)
    assert math.isclose(own["images_per_second"], 16 / own["bound_seconds"])
    assert "bound with it" in table(got) and "scenes" in table(got)


def test_fsdp_splits_its_weights_and_sends_them():
    whole, split = planned(), planned(mesh=MeshConfig(data=1, fsdp=8))
    sizes = [figures["text_encoder"]["weight_bytes"] for figures in (whole, split)]
    assert sizes[0] / 8 <= sizes[1] < sizes[0] / 7
    assert whole["text_encoder"]["interconnect_seconds"] == 0
    sent = sizes[0] * 7 / 8 / GPUS.chip.interconnect
    assert math.isclose(split["text_encoder"]["interconnect_seconds"], sent)


@pytest.mark.parametrize(
    "changes",
    [{"embeddings": "a store"}, {"stage": testing.smallest_stage(text_width=0)}],
    ids=["store", "no text"],
)
def test_a_run_without_an_encoder_has_none_in_its_plan(changes):
    got = planned(**changes)
    assert got["text_encoder"] is None and "text encoder" not in table(got)
    if "embeddings" in changes:
        step = planned()
        same = got.keys() - {"text_encoder"}
        assert {k: got[k] for k in same} == {k: step[k] for k in same}


def test_a_store_whose_gaps_are_encoded_has_an_encoder_in_memory():
    assert planned(embeddings="a store", embeddings_missing="encode")["text_encoder"] is not None


def test_encoders_of_the_hub_are_planned_without_it():
    """Imagen's has 4.6 billion parameters, by Saharia et al. 2022; our count has the table too."""
    for name, (width, inner, layers, heads) in SIZES.items():
        layer = 4 * width * heads * 64 + 3 * width * inner + 2 * width
        count = 32128 * width + layers * layer + 32 * heads + width
        assert planned(text_encoder=name)["text_encoder"]["parameters"] == count
    assert 4.6e9 < count - 32128 * width < 4.65e9
    assert planned(text_encoder=f"{name}@main")["text_encoder"]["parameters"] == count


@pytest.mark.parametrize("name", ["somebody/t5", str(pathlib.Path("no") / "such" / "folder")])
def test_an_encoder_of_unknown_size_is_told_of(name):
    got = planned(text_encoder=name)
    assert got["text_encoder"] is None
    assert f"not known: the text encoder {name}, which is not here" in table(got)
