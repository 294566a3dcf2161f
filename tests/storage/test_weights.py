"""Our own files of weights. Those of others are read in tests/published and tests/text."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cascade.errors import UserError
from cascade.storage import weights
from cascade.storage.weights import load_safetensors, save_safetensors


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_safetensors_round_trip(tmp_path, dtype, tolerance):
    params = {"levels": {"0": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}}}
    path = tmp_path / "model.safetensors"
    save_safetensors(path, params, dtype=dtype)
    back = load_safetensors(path, abstract(params))
    got = back["levels"]["0"]["kernel"]
    assert got.dtype == np.float32
    assert np.abs(got - params["levels"]["0"]["kernel"]).max() <= tolerance


@pytest.mark.parametrize(
    "expected,message",
    [
        ({"a": (2,), "b": (1,)}, "missing b"),
        ({}, "left over a"),
        ({"a": (3,)}, r"a has shape \(2,\), expected \(3,\)"),
    ],
)
def test_loading_is_total(tmp_path, expected, message):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"a": np.zeros(2, np.float32)})
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in expected.items()}
    with pytest.raises(UserError, match=message):
        load_safetensors(path, shapes)


def test_a_truncated_weights_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"a": np.zeros(200, np.float32)})
    os.truncate(path, 100)
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        load_safetensors(path, {"a": jax.ShapeDtypeStruct((200,), jnp.float32)})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_file_is_what_the_library_would_have_written(tmp_path, dtype):
    kernel = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)
    params = {"b": {"10": kernel, "9": kernel.T}, "a": np.float32(7), "none": np.zeros((0, 3))}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_safetensors(ours, params, dtype=dtype, metadata={"made": "schön"})
    named = {"b.10": kernel, "b.9": kernel.T, "a": params["a"], "none": params["none"]}
    stored = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in named.items()}
    stored["a"] = stored["a"].reshape(())
    safetensors.numpy.save_file(stored, theirs, metadata={"made": "schön"})
    assert ours.read_bytes() == theirs.read_bytes()
    back = load_safetensors(ours, abstract(params))
    assert back["a"] == 7 and back["none"].shape == (0, 3) and back["b"]["9"].flags.writeable


def test_what_is_stored_as_no_float_is_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(2, np.int8)}, tmp_path / "file")
    with pytest.raises(UserError, match="file: a is stored as I8; weights must be F32"):
        load_safetensors(tmp_path / "file", {"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(ValueError, match="cannot be stored as int8"):
        save_safetensors(tmp_path / "file", {"a": np.zeros(2)}, dtype="int8")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="none: no such file; is this a folder that"):
        load_safetensors(tmp_path / "none", {})


@pytest.mark.parametrize(
    "shards", [["../outside.safetensors"], ["/tmp/outside.safetensors"], ["a/b.safetensors"], [5]]
)
def test_an_index_names_only_files_beside_it(tmp_path, shards):
    folder = tmp_path / "model"
    folder.mkdir()
    save_safetensors(tmp_path / "outside.safetensors", {"a": np.zeros(2, np.float32)})
    index = {"weight_map": {str(i): shard for i, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not an index of safetensors shards"):
        with weights.opened(folder, "model", what="model", convert="x"):
            pass


def test_mapped_tensors_are_those_of_the_file_and_cannot_be_written(tmp_path):
    rng = np.random.default_rng(0)
    held = {
        "a": rng.integers(-128, 128, (3, 5), np.int8),  # the next begins at no multiple of four
        "b": rng.normal(size=(2, 3)).astype(np.float32),
        "c": np.arange(4),
        "d": np.zeros((0, 7), np.uint8),
        "e": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3).__array__(),
    }
    file = tmp_path / "a.safetensors"
    kinds = {"a": "I8", "b": "F32", "c": "I64", "d": "U8", "e": "BF16"}
    weights.write(
        file,
        [(name, held[name].shape, kind) for name, kind in kinds.items()],
        lambda name: held[name],
        metadata={"by": "me"},
    )
    found, metadata = weights.mapped(file)
    assert metadata == {"by": "me"} and found.keys() == held.keys()
    for name, array in safetensors.numpy.load_file(file).items():
        assert found[name].dtype == array.dtype == held[name].dtype
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(found[name], held[name])
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 0


@pytest.mark.parametrize("damage", ["cut", "missing", "header", "dtype"])
def test_what_cannot_be_mapped_is_told(tmp_path, damage):
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(40, np.int16)}, file)
    content = file.read_bytes()
    changed = {"cut": content[:-1], "header": b"\xff" * 40, "dtype": content}
    file.unlink() if damage == "missing" else file.write_bytes(changed[damage])
    says = {"missing": "no such file", "dtype": "a is stored as I16"}.get(damage, "damaged")
    with pytest.raises(UserError, match=f"a.safetensors: {says}"):
        weights.mapped(file)
