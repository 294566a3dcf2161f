"""DeepFloyd IF's U-Nets as diffusers lays them out: `unet/config.json` and safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from cascade.published.deepfloyd.unet import Activation, IFLevel, IFUNetConfig, Sees
from cascade.published.fields import (
    flag,
    integer,
    levels_with,
    number,
    one_each,
    read_fields,
)
from cascade.storage.network import Published, read_config

MODEL = "diffusers.UNet2DConditionModel"
"""The class whose config.json and tensors these are."""


def unet_config(fields: Mapping[str, Any]) -> IFUNetConfig:
    """Read the contents of a `unet/config.json`, the network of a stage I or II.

    A missing field has UNet2DConditionModel's default. Raises ValueError naming the field that asks
    for another network.
    """
    given = read_fields(
        fields,
        class_name="UNet2DConditionModel",
        defaults=_DEFAULTS,
        required=_REQUIRED,
        without_effect=_WITHOUT_EFFECT,
        network="a DeepFloyd IF stage I or II",
    )
    if given["class_embed_type"] not in (None, "timestep"):
        raise ValueError(
            f"class_embed_type must be None (stage I) or 'timestep' (stage II), "
            f"got {given['class_embed_type']!r}"
        )
    lowres = given["class_embed_type"] == "timestep"
    act = given["act_fn"]
    # Either the embedding is activated where it is made, or in every block: the same, once.
    once = given["time_embedding_act_fn"] == (act if given["resnet_skip_time_act"] else None)
    if act not in get_args(Activation) or not once:
        raise ValueError(
            f"act_fn must be gelu or silu, and time_embedding_act_fn equal to it exactly with "
            f"resnet_skip_time_act; got {act!r}, {given['time_embedding_act_fn']!r} and "
            f"{given['resnet_skip_time_act']!r}"
        )
    channels = integer(given, "in_channels")
    if lowres and channels % 2:
        raise ValueError(f"in_channels must be even in a super-resolution U-Net, {channels=}")
    levels, middle = _levels(given)
    widths = [level.width for level in levels]
    return IFUNetConfig(
        levels=levels,
        middle_attention=middle,
        in_channels=channels // 2 if lowres else channels,
        out_channels=integer(given, "out_channels"),
        text_width=integer(given, "encoder_hid_dim"),
        cross_width=integer(given, "cross_attention_dim"),
        emb_width=4 * widths[0]
        if given["time_embedding_dim"] is None
        else integer(given, "time_embedding_dim"),
        head_width=integer(given, "attention_head_dim"),
        pool_heads=integer(given, "addition_embed_type_num_heads"),
        lowres=lowres,
        groups=integer(given, "norm_num_groups"),
        epsilon=number(given, "norm_eps", 0, 1),
        residual_scale=1 / number(given, "resnet_out_scale_factor", 1e-3, 1e3),
        middle_scale=1 / number(given, "mid_block_scale_factor", 1e-3, 1e3),
        activation=act,
    )


def read_unet_config(folder: Path) -> IFUNetConfig:
    """Read `folder/config.json`, by `unet_config`; UserError naming the file and the field."""
    return read_config(folder, unet_config, MODEL)


def read_unet(
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[IFUNetConfig, dict[str, Any]]:
    """Read the network of a `unet/` folder, and its parameters, each straight onto its devices.

    dtype: what the parameters are and the network computes in, whatever the files hold.
    shardings: as in `Published.read`, which also says what errors there are.
    """
    config = dataclasses.replace(read_unet_config(folder), compute_dtype=dtype)
    return config, unet(folder, config).read(dtype, shardings)


def unet(folder: Path, config: IFUNetConfig) -> Published:
    """Describe the weights of a `unet/` folder, without opening them; config: as it was read."""
    given = (config.widths,)
    return Published(folder=folder, config=config, given=given, what="U-Net", model=MODEL)


_SEES: dict[bool, Sees] = {True: "text", False: "text and image"}
_DOWN = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
_UP = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}

# What UNet2DConditionModel has for fields that a config.json lacks; each is read or checked above.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "encoder_hid_dim": None,
    "attention_head_dim": 8,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "cross_attention_norm": None,
}

# Fields with one right value. A field that is in none of these tables must be None or False.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "addition_embed_type": ("text",),
    "cross_attention_norm": ("group_norm",),
    "resnet_time_scale_shift": ("scale_shift",),
    "encoder_hid_dim_type": (None, "text_proj"),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
}
# They speak of training, of the pipeline, or of blocks that IF does not have.
_WITHOUT_EFFECT = {
    *("sample_size", "dropout", "downsample_padding", "upcast_attention", "use_linear_projection"),
    "transformer_layers_per_block",
}


def _levels(given: Mapping[str, Any]) -> tuple[tuple[IFLevel, ...], Sees]:
    """Read the levels, and what the middle attends to."""
    attends = levels_with(given, _DOWN, _UP)
    count = len(attends)
    only, middle = given["only_cross_attention"], given["mid_block_only_cross_attention"]
    middle = only is True if middle is None else flag(given, "mid_block_only_cross_attention")
    widths = one_each(given, "block_out_channels", int, count)
    blocks = one_each(given, "layers_per_block", int, count)
    only = one_each(given, "only_cross_attention", bool, count)
    levels = tuple(
        IFLevel(width=width, blocks=b, attention=_SEES[o] if a else None)
        for width, b, o, a in zip(widths, blocks, only, attends, strict=True)
    )
    return levels, _SEES[middle]
