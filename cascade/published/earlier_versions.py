"""What earlier versions of this program wrote, as today's: the one frozen table of old names.

Until version 0.1 the JSON of a config named its classes without their modules, a stage listed no
conditions, and its parameters lay in one tree. Such files still open: `upgraded` turns their JSON
into today's, and `old_path` says what a parameter of today was called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cascade.errors import UserError
from cascade.storage.weights import leaves, load_tensors, nested

MODULES = {
    "cascade.diffusion.denoise": "Constant Interval Oscillating PerStep Threshold",
    "cascade.diffusion.grids": "EvenLogSNR Karras OnTable Quadratic Uniform",
    "cascade.diffusion.loss": "LearnedVariance Loss",
    "cascade.diffusion.process": "Cosine Discrete InterpolatedCosine LinearVP Sigmoid ZeroTerminal",
    "cascade.diffusion.samplers": "Ancestral DDIM DPMSolverPP2M DPMSolverPP2MSDE Heun",
    "cascade.models.autoencoder": "AutoencoderConfig",
    "cascade.models.clip": "CLIPTextConfig",
    "cascade.models.efficient_unet": "EfficientLevel EfficientUNetConfig",
    "cascade.models.t5": "T5Config",
    "cascade.models.unet": "Level UNetConfig",
    "cascade.published.deepfloyd.unet": "IFLevel IFUNetConfig",
    "cascade.published.x4_upscaler.unet": "UpscalerLevel UpscalerUNetConfig",
    "cascade.published.schedulers": "Respaced",
    "cascade.stage.conditions": "Augmentation",
    "cascade.stage.config": "StageConfig",
    "cascade.stage.settings": "Sampling",
    "cascade.data.degradation": "BSR Blur",
    "cascade.data.folder": "FolderData",
    "cascade.data.tfds": "TFDSData",
    "cascade.scenes.dataset": "ScenesData",
    "cascade.scenes.text_pretraining": "TextPretraining",
    "cascade.devices.sharding": "MeshConfig",
    "cascade.training.job": "Optimizer",
}
"""Module -> the classes that bare names in old JSON stand for."""

QUALIFIED = {
    name: f"{module}.{name}" for module, names in MODULES.items() for name in names.split()
}
MOVED = {"cascade.diffusion.grids.Respaced": "cascade.published.schedulers.Respaced"}
"""Classes that were elsewhere when JSON named their modules already."""
PUBLISHED = ("IFUNetConfig", "UpscalerUNetConfig")
OURS = ("UNetConfig", "EfficientUNetConfig")


def is_old(value: Any) -> bool:
    """Whether JSON of a config was written by such a version: its `type` is a bare name."""
    return isinstance(value, dict) and "." not in str(value.get("type", "."))


def upgraded(value: Any) -> Any:
    """The JSON of a config, of whatever version, as today's; what is no config stays as it is.

    UserError where a config of an earlier version is not whole.
    """
    try:
        return _upgraded(value)
    except UserError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
        raise UserError(f"a config of an earlier version is damaged: {e!r}") from None


def _upgraded(value: Any) -> Any:
    if isinstance(value, list):
        return [upgraded(v) for v in value]
    if not isinstance(value, dict):
        return value
    name = value.get("type")
    if name == "StageConfig":
        return _stage(value)
    if name == "TrainConfig":
        return _training(value)
    if name == "TextPretraining":
        return _text_pretraining(value)
    fields = {k: upgraded(v) for k, v in value.items()}
    if name in OURS:  # what it is told, a stage's conditions say
        for field in ("text_width", "context_width", "lowres"):
            fields.pop(field, None)
    if name in QUALIFIED or name in MOVED:
        fields["type"] = {**QUALIFIED, **MOVED}[name]
    return fields


def text_run_state(file: Any, state: Any) -> Any:
    """The state of a text encoder's run that an earlier version saved as one file of tensors.

    state: as the run would begin. Its averages begin at the saved weights.
    """
    saved = load_tensors(file)
    old = {
        "params": state["train"]["params"],
        "optimizer": state["train"]["opt_state"],
        "step": state["train"]["step"],
    }
    found = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(saved[jax.tree_util.keystr(path)]), old
    )
    train = {
        "params": found["params"],
        "opt_state": found["optimizer"],
        "step": found["step"],
    }
    return {"train": train, "ema": jax.tree.map(jnp.copy, found["params"])}


def old_path_of(job: Any) -> Callable[[str], str]:
    """`old_path` for what a job trains."""
    return old_path(job.stage) if hasattr(job, "stage") else str


def old_path(config: Any) -> Callable[[str], str]:
    """For a stage config of today that was read from old JSON: path of a parameter, such as
    "network/conv_in/kernel" -> its path in the files and checkpoints that lie beside that JSON."""
    latent = hasattr(config.space, "autoencoder")

    def renamed(path: str) -> str:
        if latent:
            return re.sub(r"^space/", "autoencoder/", path)
        if type(config.network).__name__ not in PUBLISHED:
            for now, then in _EMBEDDER:
                if path.startswith(now):
                    return then + path.removeprefix(now)
        return path.removeprefix("network/")

    return renamed


def as_old(tree: Any, renamed: Callable[[str], str]) -> Any:
    """Every tree of parameters in `tree` (also in an optimizer's state), with the old names."""

    def one(params: Any) -> Any:
        return nested({renamed(path): leaf for path, leaf in leaves(params)})

    return jax.tree.map(lambda x: one(x) if _is_params(x) else x, tree, is_leaf=_is_params)


def as_new(old: Any, like: Any, renamed: Callable[[str], str]) -> Any:
    """The inverse. like: a tree with today's names, whose structure the result has."""

    def one(params: Any, found: Any) -> Any:
        flat = dict(leaves(found))
        return nested({path: flat[renamed(path)] for path, _ in leaves(params)})

    return jax.tree.map(
        lambda x, y: one(x, y) if _is_params(x) else y, like, old, is_leaf=_is_params
    )


def _is_params(x: Any) -> bool:
    return isinstance(x, dict) and bool(x) and set(x) <= {"network", "conditions", "space"}


_EMBEDDER = (
    ("network/time/", "embed/time/"),
    ("conditions/lowres/time/", "embed/lowres_time/"),
    ("conditions/text/", "embed/text/"),
)


def _stage(value: dict[str, Any]) -> dict[str, Any]:
    value, network = dict(value), value["network"]
    public = network.get("type") in PUBLISHED
    resolution, low = value.pop("resolution"), value.pop("lowres_resolution", None)
    autoencoder = upgraded(value.pop("autoencoder", None))
    augmentation = upgraded(value.pop("augmentation", None))
    residual, dropout = value.pop("residual", False), value.pop("condition_dropout", 0.1)
    kinds = "cascade.published.stage.Published" if public else "cascade.stage.conditions."
    conditions = []
    if low is not None:
        lowres = {"type": f"{kinds}LowRes", "resolution": low, "residual": residual}
        conditions.append(lowres | ({} if augmentation is None else {"augmentation": augmentation}))
    widths = {"IFUNetConfig": 4096, "UpscalerUNetConfig": 1024}
    width = network.get("text_width", widths.get(str(network.get("type")), 0))
    if width:
        text = {"type": f"{kinds}Text", "width": width, "dropout": dropout}
        if not public:
            text["context_width"] = network.get("context_width")
            text["head_width"] = network.get("head_width", 64)
        conditions.append(text)
    space = {"type": "cascade.stage.space.Pixels", "resolution": resolution}
    if autoencoder is not None:
        space |= {"type": "cascade.stage.space.Latents", "autoencoder": autoencoder}
    kind = "cascade.published.stage.PublishedStageConfig" if public else QUALIFIED["StageConfig"]
    rest = {k: upgraded(v) for k, v in value.items() if k not in ("type", "network")}
    return {
        "type": kind,
        **rest,
        "space": space,
        "conditions": conditions,
        "network": upgraded(network),
    }


def _training(value: dict[str, Any]) -> dict[str, Any]:
    rank = value.get("lora_rank", 0)
    fields = {k: upgraded(v) for k, v in value.items() if k not in ("type", "lora_rank")}
    trainable = {"type": "cascade.training.trainable.Weights"}
    if rank:
        trainable = {"type": "cascade.training.trainable.LoRA", "rank": rank}
    fields.setdefault("data", {"type": QUALIFIED["ScenesData"]})
    return {
        "type": "cascade.training.stage_training.StageTraining",
        **fields,
        "trainable": trainable,
    }


def _text_pretraining(value: dict[str, Any]) -> dict[str, Any]:
    fields = {k: upgraded(v) for k, v in value.items() if k != "type"}
    b = fields["batch_size"] = fields.get("batch_size", 64)
    fields["images"] = fields.pop("examples")
    for name in ("log", "save"):
        if (steps := fields.pop(f"{name}_every_steps", None)) is not None:
            fields[f"{name}_every_images"] = steps * b
    if (steps := fields.pop("warmup_steps", None)) is not None:
        fields["warmup_images"] = steps * b
    return {"type": QUALIFIED["TextPretraining"], **fields}
