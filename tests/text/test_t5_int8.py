"""T5's matrices in int8: how far the embeddings move, and what is saved."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from cascade.models.t5 import GROUP, T5Config, T5EncoderModel, dequantized, quantized
from cascade.text.t5 import T5Encoder, read_folder, target, write_folder
from cascade.text.tokenizer import Tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "t5"


def cosines(a, b):
    """The cosine of the two embeddings of each token."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random T5 of T5-small's width."""
    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(vocab_size=100, d_model=512, d_ff=1024, num_layers=2, num_heads=6)
    params = nnx.to_pure_dict(nnx.state(T5EncoderModel(config, nnx.Rngs(0))))
    spiece = (FIXTURE / "spiece.model").read_bytes()
    write_folder(folder, config, params, spiece, dtype=np.float32)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_in_int8_point_where_they_did_in_a_quarter_of_the_memory(folder, dtype):
    exact = T5Encoder.load(folder, 12)
    small = T5Encoder.load(folder, 12, int8=True, compute_dtype=dtype)
    tokens = exact.tokenize(["a red circle", "two"])
    tokens = dataclasses.replace(tokens, ids=tokens.ids % 100)
    found = cosines(small.embed(tokens).values, exact.embed(tokens).values)
    assert 0.999 < found.min() and found.max() < 1 - 1e-7
    sizes = [sum(x.nbytes for x in jax.tree.leaves(e.params["layers"])) for e in (small, exact)]
    assert 0.25 < sizes[0] / sizes[1] < 0.27


def test_only_one_layer_is_floats_at_a_time():
    config = T5Config(vocab_size=9, d_model=256, d_ff=256, num_layers=4, num_heads=4, int8=True)
    encoder = T5Encoder(config, {}, Tokenizer(b"", 2))
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32), jax.ShapeDtypeStruct((1, 2), np.bool_)
    program = jax.jit(encoder.apply).lower(target(config), *tokens).compile()
    layer = 7 * 256 * 256 * 4
    assert program.memory_analysis().temp_size_in_bytes < 1.1 * layer


def test_a_folder_read_in_int8_is_its_weights_rounded_by_groups_of_inputs(folder, tmp_path):
    config, exact, _ = read_folder(folder)
    _, small, _ = read_folder(folder, int8=True, compute_dtype="bfloat16")
    wo, read = (
        exact["layers"]["feed_forward"]["wo"]["kernel"],
        small["layers"]["feed_forward"]["wo"],
    )
    kernel, scale = np.asarray(read["kernel"]), np.asarray(read["scale"])
    assert kernel.dtype == np.int8 and scale.dtype == np.float32
    assert scale.shape == (config.num_layers, 1024 // GROUP, 512)
    groups, exact_groups = (
        np.asarray(x, np.float32).reshape(config.num_layers, -1, GROUP, 512) for x in (kernel, wo)
    )
    steps = groups - exact_groups / scale[:, :, None]
    assert 0.4 < np.abs(steps).max() < 0.501
    np.testing.assert_array_equal(np.abs(groups).max(2), 127)
    again = dequantized(read["kernel"][1], read["scale"][1], np.float32)
    np.testing.assert_allclose(again, wo[1], atol=0.501 * scale[1].max())
    np.testing.assert_array_equal(small["shared"], exact["shared"])
    with pytest.raises(ValueError, match="without int8"):
        T5Encoder.load(folder, int8=True).save(tmp_path)


def test_large_weights_cost_those_of_other_groups_nothing():
    rng = np.random.default_rng(0)
    small, large = rng.standard_normal((2, GROUP, 3)).astype(np.float32)
    kernel, scale = quantized(np.concatenate([small, 1000 * large]))
    np.testing.assert_array_equal(kernel[:GROUP], quantized(small)[0])
    np.testing.assert_array_equal(scale[:1], quantized(small)[1])
    # Where GROUP does not divide the inputs, their greatest common divisor does.
    kernel, scale = quantized(small[: GROUP * 3 // 4])
    assert scale.shape == (3, 3)


def test_an_output_of_zeros_stays_one():
    kernel, scale = quantized(np.array([[0.0, 1.0], [0.0, -2.0]], np.float32))
    np.testing.assert_array_equal(kernel, [[0, 64], [0, -127]])
    assert np.isfinite(scale).all() and scale[0, 1] == np.float32(2 / 127)
