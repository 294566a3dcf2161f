"""T5's matrices in int8: how far the embeddings move, and what is saved."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from cascade.models.t5 import T5Config, T5EncoderModel, quantized
from cascade.text.encoder import T5Encoder
from cascade.text.folder import read_folder, write_folder

FIXTURE = Path(__file__).parent / "fixtures" / "t5"


def cosines(a, b):
    """Of each token's embeddings."""
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
    assert 0.25 < sizes[0] / sizes[1] < 0.26


def test_a_folder_read_in_int8_is_its_weights_rounded_by_output(folder, tmp_path):
    config, exact, _ = read_folder(folder)
    _, small, _ = read_folder(folder, int8=True)
    attention = exact["layers"]["attention"]["q"]["kernel"]
    q = small["layers"]["attention"]["q"]
    kernel, scale = np.asarray(q["kernel"]), np.asarray(q["scale"])
    assert kernel.dtype == np.int8 and scale.shape == (config.num_layers, 6 * 64)
    np.testing.assert_array_equal(kernel, quantized(np.asarray(attention))[0])
    steps = (kernel * scale[:, None] - attention) / scale[:, None]
    assert 0.4 < np.abs(steps).max() < 0.501
    np.testing.assert_array_equal(np.abs(kernel).max(1), 127)
    np.testing.assert_array_equal(small["shared"], exact["shared"])
    with pytest.raises(ValueError, match="without int8"):
        T5Encoder.load(folder, int8=True).save(tmp_path)


def test_an_output_of_zeros_stays_one():
    kernel, scale = quantized(np.array([[0.0, 1.0], [0.0, -2.0]], np.float32))
    np.testing.assert_array_equal(kernel, [[0, 64], [0, -127]])
    assert np.isfinite(scale).all() and scale[1] == np.float32(2 / 127)
