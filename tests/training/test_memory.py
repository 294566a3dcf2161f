"""A model that is larger than the device: what of it is there when, and what a plan says of it."""

import dataclasses
import gc
import math

import jax
import numpy as np
import pytest
from pipelines import IF8, write_model

from cascade.cli import main
from cascade.devices.chips import chip_named
from cascade.models import Network
from cascade.planning import sampling
from cascade.planning.topology import Topology
from cascade.runner.cascade import Cascade
from cascade.text.t5 import read_config, target


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("memory") / "if", IF8)


def on_devices():
    gc.collect()  # what other tests have left in cycles
    return sum(x.nbytes for x in jax.live_arrays())


def test_offloaded_weights_are_on_the_device_only_while_they_work(model):
    before = on_devices()
    cascade = Cascade.load(model, offload=True)
    held = [cascade.encoder.params, *(params for _, params in cascade.stages)]
    weights = sum(x.nbytes for x in jax.tree.leaves(held))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(held))
    (drawn,) = cascade("a red circle", seed=3)
    assert on_devices() - before < 0.2 * weights
    resident = Cascade.load(model)
    assert on_devices() - before > 0.99 * weights
    np.testing.assert_array_equal(drawn.image, resident("a red circle", seed=3)[0].image)


def test_a_plan_needs_no_weights_and_adds_up_what_each_part_takes(model):
    (model / "if8" / "model.safetensors").unlink()
    (model / "text_encoder" / "model.safetensors").unlink()
    topology = Topology("simulated", chip_named("v5e"), 1, jax.devices()[:1])
    options = {"tokens": 7, "batch_size": 2, "dtype": "bfloat16", "int8": True}
    got = sampling.plan_model(str(model), topology, **options)
    network = jax.tree.leaves(Network(IF8.network, IF8.widths).abstract())
    stage, text = got["parts"]["if8"], got["parts"]["text encoder"]
    assert stage["weight_bytes"] == 2 * sum(math.prod(leaf.shape) for leaf in network)
    encoder = dataclasses.replace(
        read_config(model / "text_encoder"), int8=True, compute_dtype="bfloat16"
    )
    assert text["weight_bytes"] == sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(target(encoder))
    )
    for part in (stage, text):
        assert part["peak_bytes"] > part["weight_bytes"] and part["temporary_bytes"] > 0
    assert got["largest_bytes"] == max(stage["peak_bytes"], text["peak_bytes"])
    assert got["fits_part_by_part"] and got["together_weight_bytes"] > stage["weight_bytes"]


def test_the_command_plans_a_model_for_chips_without_a_compiler(model, capsys):
    main(["plan", str(model), "--sample", "--topology", "h100:1"])
    assert "part by part (--offload) it fits" in capsys.readouterr().err
    for words, message in ((["--sample", "--x", "1"], "no field --x"), ([], "add --sample")):
        with pytest.raises(SystemExit):
            main(["plan", str(model), "--topology", "h100:1", *words])
        assert message in capsys.readouterr().err
