"""stable-diffusion-x4-upscaler's networks as diffusers lays them out: `unet/` and `vae/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.models import AutoencoderConfig
from cascade.published.fields import integer, levels_with, number, one_each, read_fields
from cascade.published.x4_upscaler.unet import FirstSees, UpscalerLevel, UpscalerUNetConfig
from cascade.storage import network as published
from cascade.storage.network import Published, Shapes, read_config
from cascade.storage.weights import Origin


def unet_config(fields: Mapping[str, Any]) -> UpscalerUNetConfig:
    """Read the contents of a `unet/config.json`.

    A missing field has UNet2DConditionModel's default. Raises ValueError naming the field that asks
    for another network.
    """
    given = read_fields(
        fields,
        class_name="UNet2DConditionModel",
        defaults=_UNET_DEFAULTS,
        required=_UNET_REQUIRED,
        without_effect=_UNET_WITHOUT_EFFECT,
        network="a stable-diffusion-x4-upscaler",
    )
    attends = levels_with(given, _UNET_DOWN, _UNET_UP)
    count = len(attends)
    latent = integer(given, "out_channels")
    return UpscalerUNetConfig(
        levels=tuple(
            UpscalerLevel(width=width, blocks=blocks, attention=_FIRST_SEES[only] if a else None)
            for width, blocks, only, a in zip(
                one_each(given, "block_out_channels", int, count),
                one_each(given, "layers_per_block", int, count),
                one_each(given, "only_cross_attention", bool, count),
                attends,
                strict=True,
            )
        ),
        in_channels=latent,
        out_channels=latent,
        lowres_channels=integer(given, "in_channels") - latent,
        noise_levels=integer(given, "num_class_embeds"),
        text_width=integer(given, "cross_attention_dim"),
        heads=integer(given, "attention_head_dim"),
        groups=integer(given, "norm_num_groups"),
        epsilon=number(given, "norm_eps", 0, 1),
    )


def autoencoder_config(fields: Mapping[str, Any]) -> AutoencoderConfig:
    """Read the contents of a `vae/config.json`.

    A missing field has AutoencoderKL's default. Raises ValueError naming the field that asks for
    another network.
    """
    given = read_fields(
        fields,
        class_name="AutoencoderKL",
        defaults=_VAE_DEFAULTS,
        required=_VAE_REQUIRED,
        without_effect={"sample_size", "force_upcast"},
        network="the autoencoder of latent diffusion",
    )
    count = len(w) if isinstance(w := given["block_out_channels"], list) else 1
    widths = one_each(given, "block_out_channels", int, count)
    for field, kind in (("down_block_types", _VAE_DOWN), ("up_block_types", _VAE_UP)):
        if given[field] != [kind] * len(widths):
            raise ValueError(
                f"{field} must be {kind} for each of block_out_channels, got {given[field]!r}"
            )
    if (channels := integer(given, "in_channels")) != given["out_channels"]:
        raise ValueError(f"out_channels must be in_channels={channels}")
    return AutoencoderConfig(
        widths=tuple(widths),
        blocks=integer(given, "layers_per_block"),
        channels=channels,
        latent_channels=integer(given, "latent_channels"),
        groups=integer(given, "norm_num_groups"),
        scaling=number(given, "scaling_factor", 1e-6, 1e6),
    )


def unet(folder: Path) -> Published:
    """Read the config of a `unet/` folder, and say where its weights are.

    Raises UserError naming the file and the field that asks for another network.
    """
    model = "diffusers.UNet2DConditionModel"
    config = read_config(folder, unet_config, model)
    given = (config.widths,)
    return Published(folder=folder, config=config, given=given, what="U-Net", model=model)


def autoencoder(folder: Path) -> Published:
    """Read the config of a `vae/` folder, and say where its weights are.

    Raises UserError naming the file and the field that asks for another network.
    """
    model = "diffusers.AutoencoderKL"
    config = read_config(folder, autoencoder_config, model)
    return Published(
        folder=folder, config=config, what="autoencoder", model=model, origins=_autoencoder_origins
    )


_FIRST_SEES: dict[bool, FirstSees] = {True: "text", False: "image"}
_UNET_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UNET_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}

# What UNet2DConditionModel has for fields that a config.json lacks.
_UNET_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "num_class_embeds": None,
}

# Fields with one right value, also the default. A field in none of these must be None or False.
_UNET_REQUIRED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "act_fn": ("silu",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "transformer_layers_per_block": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
}
# They speak of training, of the pipeline, of what float32 logits make up for, of a 1x1 convolution
# that is a linear layer, or of blocks that the upscaler does not have.
_UNET_WITHOUT_EFFECT = {
    *("sample_size", "dropout", "upcast_attention", "use_linear_projection"),
    *("mid_block_only_cross_attention", "addition_embed_type_num_heads"),
}

_VAE_DOWN, _VAE_UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

# What AutoencoderKL has for fields that a config.json lacks.
_VAE_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [_VAE_DOWN],
    "up_block_types": [_VAE_UP],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
# Fields with one right value, also the default. A field in none of these must be None or False.
_VAE_REQUIRED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}

_OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""What the projections of the attention are called in older files."""


def _autoencoder_origins(target: Any, shapes: Shapes) -> dict[str, Origin]:
    found = published.by_name(target)
    if not any(".proj_attn." in name for name in shapes):
        return found

    def older(name: str) -> str:
        for now, then in _OLDER.items():
            name = name.replace(f".{now}.", f".{then}.")
        return name

    return {
        path: dataclasses.replace(origin, names=tuple(map(older, origin.names)))
        for path, origin in found.items()
    }
