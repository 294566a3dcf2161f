"""A T5 encoder as a Hugging Face folder: config.json, spiece.model, model.safetensors.

Linear weights are [out, in] on disk and [in, out] here, and the layers of the file are the leading
axis of our stacked parameters. Tensors of a decoder, which full T5 checkpoints have, are ignored.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade.errors import UserError
from cascade.models.t5 import T5Config, T5EncoderModel, quantized
from cascade.storage import weights
from cascade.storage.weights import Origin


def read_folder(
    folder: Path,
    *,
    compute_dtype: str = "float32",
    int8: bool = False,
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[T5Config, dict, bytes]:
    """Returns (config, parameters as a nested dict for T5EncoderModel, bytes of the spiece.model).

    folder: a T5's; or a diffusers pipeline's, or the text_encoder/ of one, beside which it keeps
        spiece.model in tokenizer/.
    Parameters are float32 whatever the file holds; with compute_dtype bfloat16 the matrices of the
    layers are bfloat16 (half the memory; they would be cast at each use anyway), and with int8 they
    are `quantized` (a quarter) as they are read. Each goes from disk to its device before the next.
    shardings: parameters as ShapeDtypeStructs -> the placement of each; None is the default device.
    Raises UserError when a file or tensor is missing, damaged, left over or of another shape.
    """
    folder, config_file, vocabulary = _places(folder)
    config = dataclasses.replace(_read_config(config_file), compute_dtype=compute_dtype, int8=int8)
    return config, _read_parameters(folder, config, shardings), vocabulary.read_bytes()


def read_config(folder: Path) -> T5Config:
    """What the config.json of such a folder says; no other file need be there."""
    return _read_config(_weights_folder(folder) / "config.json")


def copy_folder(source: Path, folder: Path, dtype: str | None = None) -> None:
    """What read_folder reads of `source`, as a T5 folder of its own, tensor by tensor.

    dtype: of the tensors there, in safetensors' spelling; None is that of each.
    """
    source, config_file, vocabulary = _places(source)
    config = _read_config(config_file)
    with weights.opened(source, "model", what="text encoder", convert=CONVERT) as opened:
        names = [n for o in check(opened.name, opened.shapes, config).values() for n in o.names]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spiece.model").write_bytes(vocabulary.read_bytes())
        (folder / "config.json").write_text(json.dumps(config.to_hf_dict(), indent=2) + "\n")
        weights.write(
            folder / "model.safetensors",
            [(name, opened.shapes[name], dtype or opened.dtype(name)) for name in names],
            lambda name: opened[name, (slice(None),) * len(opened.shapes[name])],
        )


def write_folder(
    folder: Path, config: T5Config, params: dict, spiece: bytes, *, dtype: Any = np.float16
) -> None:
    """The inverse of read_folder, and readable by transformers; dtype: of the tensors on disk.

    Raises ValueError when a parameter does not fit in dtype.
    """
    found = {}
    for path, origin in origins(config).items():
        value = _leaf(params, path)
        for i, name in enumerate(origin.names):
            found[name] = (value[i] if origin.stacked else value, origin.axes is not None)

    def read(name: str) -> np.ndarray:
        value, transposed = found[name]
        with np.errstate(over="ignore"):
            stored = np.asarray(value, np.float32).astype(dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"{name} has values that {np.dtype(dtype)} cannot hold: write float32")
        return stored.T if transposed else stored

    spelled = next(k for k, v in weights.DTYPES.items() if v == np.dtype(dtype))
    tensors = [(n, v.shape[::-1] if t else v.shape, spelled) for n, (v, t) in found.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece)
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict(), indent=2) + "\n")
    weights.write(folder / "model.safetensors", tensors, read)


# The two names of one tensor, tied in T5: a file has either or both.
EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")
IGNORED = r"decoder\.|lm_head\.|shared\.weight$|encoder\.embed_tokens\.weight$"
CONVERT = (
    'python -c "from transformers import T5EncoderModel as T; '
    "T.from_pretrained('SOURCE').save_pretrained('DIR')\", copy spiece.model to DIR, and give DIR"
)


def origins(config: T5Config, embedding: str = EMBEDDING[0]) -> dict[str, Origin]:
    """Where in the file each parameter is. embedding: its name there."""
    attention, dense = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    layer = {
        **{f"attention/{n}/kernel": (f"{attention}.{n}", (1, 0)) for n in "qkvo"},
        **{f"feed_forward/{n}/kernel": (f"{dense}.{n}", (1, 0)) for n in ("wi_0", "wi_1", "wo")},
        "attention_norm/scale": ("layer.0.layer_norm", None),
        "feed_forward_norm/scale": ("layer.1.layer_norm", None),
    }
    blocks = range(config.num_layers)
    return {
        "shared": Origin((embedding,)),
        "relative_attention_bias": Origin(
            (f"encoder.block.0.{attention}.relative_attention_bias.weight",)
        ),
        "final_norm/scale": Origin(("encoder.final_layer_norm.weight",)),
        **{
            f"layers/{path}": Origin(
                tuple(f"encoder.block.{i}.{name}.weight" for i in blocks), axes, stacked=True
            )
            for path, (name, axes) in layer.items()
        },
    }


def target(config: T5Config, shardings: Callable[[Any], Any] | None = None) -> Any:
    """The parameters as ShapeDtypeStructs, with their dtypes and placement."""
    model = nnx.eval_shape(lambda: T5EncoderModel(config, nnx.Rngs(0)))
    abstract = nnx.to_pure_dict(nnx.state(model))

    def dtype(leaf: jax.ShapeDtypeStruct) -> Any:
        if leaf.dtype == jnp.int8:
            return leaf.dtype
        # In int8 the layers have no matrices of floats, only scales.
        matrix = len(leaf.shape) == 3 and not config.int8
        return jnp.dtype(config.compute_dtype if matrix else "float32")

    return weights.as_target(abstract, dtype, shardings)


def check(name: str, shapes: Mapping[str, Sequence[int]], config: T5Config) -> dict[str, Origin]:
    """The origins, if tensors of these shapes are an encoder of this config, or UserError."""
    either = EMBEDDING[0] if EMBEDDING[0] in shapes else EMBEDDING[1]
    found = origins(config, either)
    weights.fit(name, shapes, found, target(config), ignored=IGNORED)
    return found


def _places(folder: Path) -> tuple[Path, Path, Path]:
    """The folder of the weights, its config.json, and the spiece.model."""
    folder = _weights_folder(folder)
    config_file, vocabulary = folder / "config.json", folder / "spiece.model"
    if not vocabulary.is_file():
        beside = folder.parent / "tokenizer" / vocabulary.name
        vocabulary = beside if beside.is_file() else vocabulary
    for file in (config_file, vocabulary):
        if not file.is_file():
            raise UserError(
                f"text encoder {folder}: {file.name} is missing; a T5 folder holds config.json, "
                "spiece.model and model.safetensors"
            )
    return folder, config_file, vocabulary


def _weights_folder(folder: Path) -> Path:
    """The folder itself, or the text_encoder/ of a pipeline's."""
    if not folder.is_dir():
        raise UserError(f"text encoder {folder}: no such folder")
    if not (folder / "config.json").is_file() and (folder / "text_encoder").is_dir():
        return folder / "text_encoder"
    return folder


def _read_config(file: Path) -> T5Config:
    try:
        return T5Config.from_hf_dict(json.loads(file.read_text()))
    except FileNotFoundError:
        raise UserError(f"text encoder {file}: no such file") from None
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f"text encoder {file}: {e}") from None


def _read_parameters(
    folder: Path, config: T5Config, shardings: Callable[[Any], Any] | None
) -> dict:
    with weights.opened(folder, "model", what="text encoder", convert=CONVERT) as opened:
        found = check(opened.name, opened.shapes, dataclasses.replace(config, int8=False))
        wanted = target(config, shardings)
        return (
            _read_int8(opened, found, wanted)
            if config.int8
            else weights.read(opened, found, wanted)
        )


def _read_int8(opened: weights.Weights, found: Mapping[str, Origin], wanted: Any) -> dict:
    """`weights.read`, with the int8 kernels made of the file's floats, a layer at a time."""
    leaves = dict(weights.leaves(wanted))
    kernels = [path for path, leaf in leaves.items() if leaf.dtype == jnp.int8]
    made = {}
    for path in kernels:
        scale_path = path.removesuffix("kernel") + "scale"
        kernel, scale = leaves.pop(path), leaves.pop(scale_path)
        filled = np.empty(kernel.shape, np.int8), np.empty(scale.shape, np.float32)
        for i, name in enumerate(found[path].names):
            layer = opened.whole(Origin((name,), found[path].axes), kernel.shape[1:])
            filled[0][i], filled[1][i] = quantized(layer)
        for name, leaf, value in zip((path, scale_path), (kernel, scale), filled, strict=True):
            made[name] = jax.device_put(value, leaf.sharding)
    made |= weights.leaves(weights.read(opened, found, _nested(leaves)))
    return _nested(made)


def _nested(flat: Mapping[str, Any]) -> dict:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _leaf(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree
