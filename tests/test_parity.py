"""Against PyTorch, diffusers 0.42 and transformers 5, live. Skipped without the extra [parity]."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.append(str(FIXTURES))
import make_deepfloyd as reference  # noqa: E402

from cascade.models import Conditioning, Network  # noqa: E402
from cascade.pretrained import deepfloyd  # noqa: E402
from cascade.text.captions import prepared  # noqa: E402

UNETS = {
    "stage I, three levels, two blocks": reference.TINY["stage1"]
    | reference.blocks([False, True, True])
    | {"block_out_channels": [8, 16, 24], "layers_per_block": 2, "attention_head_dim": 8},
    "stage I, one head as wide as the level": reference.TINY["stage1"]
    | {"attention_head_dim": 16, "layers_per_block": [2, 1], "act_fn": "silu"},
    "stage II, text only": reference.TINY["stage2"] | {"layers_per_block": [1, 3]},
    "stage II, hybrid by level": reference.TINY["stage2"]
    | reference.blocks([True, True])
    | {"only_cross_attention": [True, False]},
    "stage II, hybrid throughout": reference.TINY["stage2"] | {"only_cross_attention": False},
}


@pytest.mark.parametrize("name", UNETS)
def test_unets_equal_diffusers(name, tmp_path):
    fields = UNETS[name]
    theirs = reference.random_unet(fields)
    theirs.save_pretrained(tmp_path)
    side = 2 ** (len(fields["block_out_channels"]) - 1)
    inputs = reference.unet_inputs(fields, (2 * side, 3 * side))
    expected = reference.unet_output(theirs, inputs).transpose(0, 2, 3, 1)
    config, params = deepfloyd.read_unet(tmp_path)
    x = jnp.asarray(inputs["x"].transpose(0, 2, 3, 1))
    cond = Conditioning(text=jnp.asarray(inputs["text"]))
    if config.lowres:
        x, lowres = jnp.split(x, 2, axis=-1)
        level = jnp.asarray(inputs["level"], jnp.float32)
        cond = Conditioning(text=cond.text, lowres=lowres, lowres_time=level)
    time = jnp.asarray(inputs["time"], jnp.float32)
    output = jax.jit(Network(config).__call__)(params, x, time, cond)
    assert np.abs(output - expected).max() < 1e-4 * np.abs(expected).max()


def test_captions_equal_diffusers():
    pipeline = object.__new__(diffusers.IFPipeline)
    texts = reference.CAPTIONS
    assert [prepared(t, "clean") for t in texts] == pipeline._text_preprocessing(texts, True)
    assert [prepared(t, "lower") for t in texts] == pipeline._text_preprocessing(texts, False)
