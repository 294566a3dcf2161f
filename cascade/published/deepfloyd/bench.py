"""`cascade bench unet`: one forward pass of DeepFloyd IF's U-Nets, against PyTorch.

Both sides have the same device, weights and inputs (batch 1, 77 tokens), and run by turns, so that
whatever else the machine does slows both. On a CPU they compute in float32, and PyTorch is eager;
on a GPU in bfloat16, and its model goes through torch.compile.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from cascade.errors import UserError


@dataclass(frozen=True, kw_only=True)
class UNetOptions:
    """Time one forward pass of a U-Net of DeepFloyd IF with random weights, beside PyTorch's.

    PyTorch and diffusers need not be installed; without them there is no ratio.
    """

    size: Literal["S", "M", "IF-I-M", "SR-S"] = "S"
    """S (9 M parameters), M (83 M) and IF-I-M as published (372 M) at 64 px; SR-S is a small
    stage II (33 M) at 256 px."""
    cores: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")
    ] = None
    """CPU cores of this process that either side may use."""
    repeats: int = 9
    """Timed passes of either side, by turns; the medians are compared."""


def bench_unet(options: UNetOptions) -> dict[str, Any]:
    """Measure the seconds of a pass, and PyTorch's divided by ours: above 1 we are the faster.

    Returns JSON values; without PyTorch and diffusers they lack its times. Raises UserError for
    fewer than one repeat, and on a device that PyTorch does not have.
    """
    if options.repeats < 1:
        raise UserError(f"--repeats must be 1 or more, got {options.repeats}")
    cores = _hold(options.cores)  # ahead of the threads that JAX and PyTorch start
    # PyTorch needs memory of the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from cascade.models import Network, Signals
    from cascade.published.deepfloyd import reader as deepfloyd

    device = jax.devices()[0]
    if device.platform not in ("cpu", "gpu"):
        raise UserError(f"cascade bench unet: PyTorch has no {device.platform} to compare with")
    gpu = device.platform == "gpu"
    fields, rng = FIELDS[options.size], np.random.default_rng(0)
    config = deepfloyd.unet_config(fields)
    if gpu:
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    network, side = Network(config, config.widths), fields["sample_size"]
    picture = rng.standard_normal((1, side, side, fields["in_channels"]), np.float32)
    text = rng.standard_normal((1, 77, config.text_width), np.float32)
    time_, level = np.array([500.0], np.float32), np.array([250.0], np.float32)
    x, lowres = picture[..., :3], picture[..., 3:] if config.lowres else None
    told = {} if lowres is None else {"channels": (lowres,), "vectors": (level[:, None],)}
    signals = Signals(tokens=text, mask=np.ones(text.shape[:2], bool), **told)

    theirs = None
    if all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        with tempfile.TemporaryDirectory() as folder:
            theirs = _torch_pass(fields, folder, picture, text, time_, level, cores, gpu)
            params = deepfloyd.read_unet(Path(folder))[1]
    else:
        print(
            "torch and diffusers are not installed, so there is nothing to compare with: "
            "pip install 'cascade-diffusion[parity]'",
            file=sys.stderr,
        )
        params = jax.jit(network.init)(jax.random.key(0, impl="rbg"))

    params = jax.device_put(
        jax.tree.map(lambda x: x.astype(config.compute_dtype), params) if gpu else params
    )
    start = time.perf_counter()
    compiled = jax.jit(network.__call__).lower(params, x, time_, signals).compile()
    compile_seconds = time.perf_counter() - start
    arrays = jax.device_put((x, time_, signals))

    def ours() -> np.ndarray:
        return np.asarray(compiled(params, *arrays))

    sides: dict[str, Callable[[], np.ndarray]] = {"cascade": ours}
    if theirs is not None:
        sides["torch"] = theirs
    outputs = {name: once() for name, once in sides.items()}  # warm, and compared below
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, once in sides.items():
            start = time.perf_counter()
            once()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(all_) for name, all_ in seconds.items()}
    result = {
        "unet": options.size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "input": list(picture.shape),
        "device": device.device_kind,
        "dtype": config.compute_dtype,
        "cores": cores,
        "repeats": options.repeats,
        "cascade_seconds": round(medians["cascade"], 5),
        "cascade_fastest_seconds": round(min(seconds["cascade"]), 5),
        "compile_seconds": round(compile_seconds, 1),
    }
    if theirs is not None:
        off = np.abs(outputs["cascade"] - outputs["torch"]).max()
        result |= {
            "torch_seconds": round(medians["torch"], 5),
            "torch_fastest_seconds": round(min(seconds["torch"]), 5),
            "ratio": round(medians["torch"] / medians["cascade"], 3),
            "largest_difference": float(off / np.abs(outputs["torch"]).max()),
        }
    return result


def _stage_1(width: int, **changes: Any) -> dict[str, Any]:
    """Give the fields of a `unet/config.json` as published for stage I, of this width."""
    attends = [False, True, True, True]
    return {
        "sample_size": 64,
        "in_channels": 3,
        "block_out_channels": [width, 2 * width, 3 * width, 4 * width],
        "layers_per_block": 3,
        "cross_attention_dim": 4 * width,
        "attention_head_dim": 64,
        "encoder_hid_dim": 4096,
        **_blocks(attends),
        **_BOTH,
        **changes,
    }


def _blocks(attends: list[bool]) -> dict[str, Any]:
    down = ["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends]
    up = ["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends]
    return {"down_block_types": down, "up_block_types": up[::-1]}


_BOTH = {
    "out_channels": 6,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim_type": "text_proj",
}
_SMALL = {"attention_head_dim": 32}
FIELDS: dict[str, dict[str, Any]] = {
    "S": _stage_1(32, encoder_hid_dim=128, addition_embed_type_num_heads=8, **_SMALL),
    "M": _stage_1(96, encoder_hid_dim=1024, addition_embed_type_num_heads=16, **_SMALL),
    "IF-I-M": _stage_1(192),
    "SR-S": {
        "sample_size": 256,
        "in_channels": 6,
        "block_out_channels": [32, 64, 128, 192, 192],
        "layers_per_block": [2, 2, 3, 5, 5],
        "cross_attention_dim": 192,
        "encoder_hid_dim": 128,
        "class_embed_type": "timestep",
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 192,
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1 / 0.7071,
        "mid_block_scale_factor": 1 / 0.7071,
        "only_cross_attention": True,
        **_blocks([False, False, False, True, True]),
        **_BOTH,
        **_SMALL,
    },
}
"""The fields of `unet/config.json` for each size; IF-I-M's are as published."""


def _hold(cores: int | None) -> int:
    """Keep this process to so many of its cores, and return how many it has then."""
    if not hasattr(os, "sched_setaffinity"):
        if cores is not None:
            raise UserError("--cores: this system has no way to hold a process to some cores")
        return os.cpu_count() or 1
    own = sorted(os.sched_getaffinity(0))
    if cores is not None:
        if not 1 <= cores <= len(own):
            raise UserError(
                f"--cores must be 1, or up to the number of cores here, {len(own)}, got {cores}"
            )
        own = own[:cores]
        os.sched_setaffinity(0, own)
    return len(own)


def _torch_pass(
    fields, folder, picture, text, time_, level, cores, gpu
) -> Callable[[], np.ndarray]:
    """Make a pass of diffusers' U-Net, channels last as ours, and write its weights to `folder`."""
    import diffusers  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    torch.set_num_threads(cores)
    model = diffusers.UNet2DConditionModel.from_config(fields).eval()
    model.save_pretrained(folder)
    where = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {}
    model = torch.compile(model.to(**where)) if gpu else model
    x = torch.tensor(picture).permute(0, 3, 1, 2).contiguous().to(**where)
    time_ = torch.tensor(time_).to(**where)
    given = {
        "encoder_hidden_states": torch.tensor(text).to(**where),
        "class_labels": torch.tensor(level).to(**where) if fields.get("class_embed_type") else None,
    }

    def once() -> np.ndarray:
        with torch.inference_mode():
            sample = model(x, time_, **given).sample.permute(0, 2, 3, 1)
            return sample.float().cpu().numpy()

    return once
