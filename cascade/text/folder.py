"""A T5 encoder as a Hugging Face folder: config.json, spiece.model, model.safetensors.

Nothing here unpickles: `.bin` checkpoints are refused. Linear weights are [out, in] on disk and
[in, out] here, and the layers of the file are the leading axis of our stacked parameters.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from cascade.errors import UserError
from cascade.models.t5 import T5Config, T5EncoderModel


def read_folder(folder: Path, *, compute_dtype: str = "float32") -> tuple[T5Config, dict, bytes]:
    """Returns (config, parameters as a nested dict for T5EncoderModel, bytes of the spiece.model).

    Parameters are float32 whatever the file holds; with compute_dtype bfloat16 the matrices of the
    layers are bfloat16 (half the memory; they would be cast at each use anyway).
    Raises UserError when a file or tensor is missing, damaged or of another shape. Tensors of a
    decoder, which full T5 checkpoints have, are ignored.
    """
    if not folder.is_dir():
        raise UserError(f"text encoder {folder}: no such folder")
    config_file, vocabulary = folder / "config.json", folder / "spiece.model"
    for file in (config_file, vocabulary):
        if not file.is_file():
            raise UserError(
                f"text encoder {folder}: {file.name} is missing; a T5 folder holds config.json, "
                "spiece.model and model.safetensors"
            )
    try:
        fields = json.loads(config_file.read_text())
        config = dataclasses.replace(T5Config.from_hf_dict(fields), compute_dtype=compute_dtype)
    except ValueError as e:
        raise UserError(f"text encoder {config_file}: {e}") from None
    return config, _read_parameters(folder, config), vocabulary.read_bytes()


def write_folder(
    folder: Path, config: T5Config, params: dict, spiece: bytes, *, dtype: Any = np.float16
) -> None:
    """The inverse of read_folder, and readable by transformers; dtype: of the tensors on disk.

    Raises ValueError when a parameter does not fit in dtype.
    """
    tensors = {}
    for name, (path, layer, transposed) in _tensors(config).items():
        value = np.asarray(_leaf(params, path), np.float32)
        value = value if layer is None else value[layer]
        with np.errstate(over="ignore"):
            stored = (value.T if transposed else value).astype(dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"{name} has values that {np.dtype(dtype)} cannot hold: write float32")
        tensors[name] = np.ascontiguousarray(stored)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece)
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict(), indent=2) + "\n")
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)


# The two names of one tensor, tied in T5: a file has either or both.
_EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")

_CONVERT = (
    'convert it once where torch is installed: python -c "from transformers import T5EncoderModel '
    "as T; T.from_pretrained('SOURCE').save_pretrained('DIR')\", copy spiece.model to DIR, and "
    "give DIR"
)

_Path = tuple[str, ...]


def _tensors(config: T5Config) -> dict[str, tuple[_Path, int | None, bool]]:
    """Name in the file -> (path of ours, layer or None if not stacked, transposed)."""
    attention, dense = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    per_layer = {
        **{f"{attention}.{n}": (("attention", n, "kernel"), True) for n in "qkvo"},
        **{f"{dense}.{n}": (("feed_forward", n, "kernel"), True) for n in ("wi_0", "wi_1", "wo")},
        "layer.0.layer_norm": (("attention_norm", "scale"), False),
        "layer.1.layer_norm": (("feed_forward_norm", "scale"), False),
    }
    return {
        _EMBEDDING[0]: (("shared",), None, False),
        f"encoder.block.0.{attention}.relative_attention_bias.weight": (
            ("relative_attention_bias",),
            None,
            False,
        ),
        "encoder.final_layer_norm.weight": (("final_norm", "scale"), None, False),
        **{
            f"encoder.block.{layer}.{name}.weight": (("layers", *path), layer, transposed)
            for layer in range(config.num_layers)
            for name, (path, transposed) in per_layer.items()
        },
    }


def _read_parameters(folder: Path, config: T5Config) -> dict:
    model = nnx.eval_shape(lambda: T5EncoderModel(config, nnx.Rngs(0)))
    abstract = nnx.to_pure_dict(nnx.state(model))
    expected = _tensors(config)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(file)) for file in _weight_files(folder)]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        if _EMBEDDING[0] not in where and _EMBEDDING[1] in where:
            expected[_EMBEDDING[1]] = expected.pop(_EMBEDDING[0])
        problems = []
        for name, (path, layer, transposed) in expected.items():
            shape = list(_leaf(abstract, path).shape[0 if layer is None else 1 :])
            shape = shape[::-1] if transposed else shape
            if name not in where:
                problems.append(f"{name} is missing")
            elif (found := where[name].get_slice(name).get_shape()) != shape:
                problems.append(f"{name} is {found}, config.json asks for {shape}")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise UserError(f"text encoder {folder}: {'; '.join(problems[:5])}{more}")
        # Filled in place: the largest encoders leave no room for a second copy.
        params = jax.tree.map(lambda a: np.empty(a.shape, _dtype(a, config)), abstract)
        for name, (path, layer, transposed) in expected.items():
            value = where[name].get_tensor(name)
            value = value.T if transposed else value
            _leaf(params, path)[... if layer is None else layer] = value
    return params


def _dtype(leaf: jax.ShapeDtypeStruct, config: T5Config) -> np.dtype:
    return jnp.dtype(config.compute_dtype if leaf.ndim == 3 else "float32")


def _weight_files(folder: Path) -> list[Path]:
    """The plain file, else the plain index, else a variant (fp16) of either, in both spellings."""
    if (single := folder / "model.safetensors").is_file():
        return [single]
    for index in [
        *folder.glob("model.safetensors.index.json"),
        *sorted(folder.glob("model*safetensors*index*.json")),
    ]:
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"text encoder {index}: not an index of safetensors shards") from None
        if missing := [s for s in shards if not (folder / s).is_file()]:
            raise UserError(
                f"text encoder {folder}: {missing[0]}, which {index.name} lists, is missing"
            )
        return [folder / s for s in shards]
    if variants := sorted(folder.glob("model*.safetensors")):
        return variants[:1]
    pickled = any(folder.glob("*.bin"))
    found = "only pickled weights (.bin), which are never read" if pickled else "no safetensors"
    raise UserError(f"text encoder {folder}: {found}; {_CONVERT}")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(os.fspath(file), framework="np") as tensors:
            yield tensors
    except safetensors.SafetensorError as e:
        raise UserError(
            f"text encoder {file}: damaged or cut short ({e}); copy or download it again"
        ) from None


def _leaf(tree: Any, path: _Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree
