"""CLIP (Radford et al. 2021): a text and a picture in one space, where what belongs is near.

Both towers are transformers:

    x = x + o(softmax(q(y) k(y)^T / sqrt(d)) v(y))   y = LN(x)
    x = x + fc2(act(fc1(LN(x))))

The text's begins with token[ids] + position, and a token sees itself and those before; its
embedding is LN(x) at the end of the text. The picture's begins with LN([class; W patches] +
position), and all see all; its embedding is LN(x) of the class. One matrix each leads into the
space that they share.

stable-diffusion-x4-upscaler is told a prompt by the last hidden states of the text's tower alone,
OpenCLIP's ViT-H without its last layer. Layers are equal, so their parameters carry a leading layer
axis and run under one `lax.scan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from cascade import ranges
from cascade.models.layers import Linear, stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Sizes of a CLIP text encoder, under the names of the Hugging Face config.json.

    config.json has all fields but compute_dtype.
    """

    vocab_size: int = 49408
    """Ids are below this number, at least 1."""
    hidden_size: int = 512
    """The embedding of a token has this many channels, a multiple of num_attention_heads."""
    intermediate_size: int = 2048
    """A feed-forward layer has this many channels inside, at least 1."""
    num_hidden_layers: int = 12
    """There are this many layers, at least 1."""
    num_attention_heads: int = 8
    """An attention layer has this many heads, at least 1."""
    max_position_embeddings: int = 77
    """A text has at most this many tokens, at least 2."""
    hidden_act: str = "quick_gelu"
    """Feed-forward layers are activated by this function: gelu or quick_gelu."""
    layer_norm_eps: float = 1e-5
    """The norms add this to the variance."""
    eos_token_id: int = 49407
    """The token at whose first place the embedding of the text is; 2 is any number, as it was in
    files where that of the largest id was meant."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """The matrix products have this dtype."""

    def __post_init__(self):
        ranges.whole(self, 1, 2**22, "vocab_size")
        ranges.whole(self, 1, ranges.MOST_CHANNELS, "hidden_size", "intermediate_size")
        ranges.whole(self, 1, 1024, "num_hidden_layers", "num_attention_heads")
        ranges.whole(self, 2, 4096, "max_position_embeddings")
        ranges.whole(self, 1, 2**22, "eos_token_id")
        ranges.real(self, 0, 1, "layer_norm_eps")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"CLIPTextConfig.hidden_act must be {' or '.join(_ACTIVATIONS)}, "
                f"got {self.hidden_act!r}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "CLIPTextConfig.hidden_size must be a multiple of num_attention_heads="
                f"{self.num_attention_heads}, got {self.hidden_size}"
            )

    def build(self, rngs: nnx.Rngs) -> CLIPTextModel:
        """Make the network, with fresh float32 parameters."""
        return CLIPTextModel(self, rngs)

    @classmethod
    def from_hf_dict(cls, fields: Mapping[str, Any]) -> CLIPTextConfig:
        """Read the contents of a Hugging Face config.json.

        Fields that we do not have are ignored; missing ones have CLIPTextConfig's default there,
        which is also ours. Raises ValueError naming what is not of a CLIP text encoder.
        """
        if (kind := fields.get("model_type", "clip_text_model")) != "clip_text_model":
            raise ValueError(
                f"model_type must be 'clip_text_model', got {kind!r}: the config of another model"
            )
        known = {f.name for f in dataclasses.fields(cls)} - {"compute_dtype"}
        return cls(**{k: v for k, v in fields.items() if k in known})


class CLIPTextModel(nnx.Module):
    """The encoder, which turns token ids into contextual embeddings."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.token_embedding = _normal(rngs, (config.vocab_size, width))
        self.position_embedding = _normal(rngs, (config.max_position_embeddings, width))
        self.layers = stack(lambda rngs: _Layer(config, rngs), config.num_hidden_layers, rngs)
        self.final_layer_norm = _layer_norm(config, rngs)

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Give the last hidden states, float32, of ids in [0, vocab_size).

        A row has at most max_position_embeddings of them; padding is read too. There is no mask but
        the causal one: what stands behind a token never changes it, so padding at the end cannot.
        """
        length = ids.shape[1]
        with _precision(self.config):
            x = self.token_embedding[...][ids] + self.position_embedding[...][:length]
            return self.final_layer_norm(_through(self.layers, x.astype(jnp.float32)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Sizes of CLIP's tower for pictures, under the names of the Hugging Face config.json.

    config.json has all fields but compute_dtype.
    """

    hidden_size: int = 768
    """The embedding of a patch has this many channels, a multiple of num_attention_heads."""
    intermediate_size: int = 3072
    """A feed-forward layer has this many channels inside, at least 1."""
    num_hidden_layers: int = 12
    """There are this many layers, at least 1."""
    num_attention_heads: int = 12
    """An attention layer has this many heads, at least 1."""
    image_size: int = 224
    """Pictures have this side in pixels, a multiple of patch_size."""
    patch_size: int = 32
    """Patches have this side in pixels, at least 1."""
    hidden_act: str = "quick_gelu"
    """Feed-forward layers are activated by this function: gelu or quick_gelu."""
    layer_norm_eps: float = 1e-5
    """The norms add this to the variance."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """The matrix products have this dtype."""

    def __post_init__(self):
        ranges.whole(self, 1, ranges.MOST_CHANNELS, "hidden_size", "intermediate_size")
        ranges.whole(self, 1, 1024, "num_hidden_layers", "num_attention_heads")
        ranges.whole(self, 1, 4096, "image_size", "patch_size")
        ranges.real(self, 0, 1, "layer_norm_eps")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"CLIPVisionConfig.hidden_act must be {' or '.join(_ACTIVATIONS)}, "
                f"got {self.hidden_act!r}"
            )
        for name, divisor in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"CLIPVisionConfig.{name} must be a multiple of {divisor}="
                    f"{getattr(self, divisor)}, got {getattr(self, name)}"
                )

    def build(self, rngs: nnx.Rngs) -> CLIPVisionModel:
        """Make the network, with fresh float32 parameters."""
        return CLIPVisionModel(self, rngs)

    @classmethod
    def from_hf_dict(cls, fields: Mapping[str, Any]) -> CLIPVisionConfig:
        """Read the fields of a Hugging Face `vision_config`, as `CLIPTextConfig.from_hf_dict`.

        Raises ValueError naming what is not of a CLIP of three-channel pictures.
        """
        if (channels := fields.get("num_channels", 3)) != 3:
            raise ValueError(f"num_channels must be 3, got {channels!r}")
        known = {f.name for f in dataclasses.fields(cls)} - {"compute_dtype"}
        return cls(**{k: v for k, v in fields.items() if k in known})


class CLIPVisionModel(nnx.Module):
    """The tower for pictures."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = _normal(rngs, (width,))
        self.patch_embedding = _normal(rngs, (patch, patch, 3, width))
        count = (config.image_size // patch) ** 2
        self.position_embedding = _normal(rngs, (1 + count, width))
        self.pre_layrnorm = _layer_norm(config, rngs)  # so it is published
        self.layers = stack(lambda rngs: _Layer(config, rngs), config.num_hidden_layers, rngs)
        self.post_layernorm = _layer_norm(config, rngs)

    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b n d"]:
        """Give the last hidden states, float32: of the class, then of the patches by rows.

        x: pictures of image_size pixels, normalised as the weights want it.
        """
        patch, width = self.config.patch_size, self.config.hidden_size
        with _precision(self.config):
            patches = jax.lax.conv_general_dilated(
                x.astype(jnp.float32),
                self.patch_embedding[...].astype(jnp.float32),
                (patch, patch),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ).reshape(len(x), -1, width)
            first = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, width))
            h = jnp.concatenate([first, patches], axis=1) + self.position_embedding[...]
            return _through(self.layers, self.pre_layrnorm(h.astype(jnp.float32)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both towers, and the space that they share."""

    text: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    """The sizes of the tower for texts."""
    vision: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    """The sizes of the tower for pictures."""
    projection_dim: int = 512
    """An embedding in the space that they share has this many channels, at least 1."""

    def __post_init__(self):
        ranges.whole(self, 1, ranges.MOST_CHANNELS, "projection_dim")

    def build(self, rngs: nnx.Rngs) -> CLIPModel:
        """Make the network, with fresh float32 parameters."""
        return CLIPModel(self, rngs)

    @classmethod
    def from_hf_dict(cls, fields: Mapping[str, Any]) -> CLIPConfig:
        """Read the contents of a Hugging Face config.json of both towers.

        Raises ValueError naming what is not of a CLIP.
        """
        if (kind := fields.get("model_type")) != "clip":
            raise ValueError(
                f"model_type must be 'clip', got {kind!r}: the config of another model"
            )
        towers = {}
        for name, kind in (("text", CLIPTextConfig), ("vision", CLIPVisionConfig)):
            # Some older files have these fields twice, and the second prevail.
            given = fields.get(f"{name}_config") or {}
            towers[name] = kind.from_hf_dict({**given, **(fields.get(f"{name}_config_dict") or {})})
        return cls(**towers, projection_dim=fields.get("projection_dim", 512))


class CLIPModel(nnx.Module):
    """Both towers, with what leads from each into the space that they share."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextModel(config.text, rngs)
        self.vision_model = CLIPVisionModel(config.vision, rngs)
        shared = config.projection_dim
        self.text_projection = _normal(rngs, (config.text.hidden_size, shared))
        self.visual_projection = _normal(rngs, (config.vision.hidden_size, shared))
        self.logit_scale = nnx.Param(jnp.float32(np.log(1 / 0.07)))

    def text(self, ids: Int[Array, "b l"]) -> Float[Array, "b d"]:
        """Give the embedding of each text, float32, of length 1.

        A row of ids holds the end of its text, and whatever comes after it has no effect.
        """
        end = self.config.text.eos_token_id
        at = jnp.argmax(ids if end == 2 else ids == end, axis=1)
        states = self.text_model(ids)[jnp.arange(len(ids)), at]
        with _precision(self.config.text):
            return _unit(states @ self.text_projection[...].astype(jnp.float32))

    def image(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """Give the embedding of each picture, float32, of length 1.

        x: pictures of image_size pixels, normalised as the weights want it.
        """
        tower = self.vision_model
        states = tower.post_layernorm(tower(x)[:, 0])
        with _precision(self.config.vision):
            return _unit(states @ self.visual_projection[...].astype(jnp.float32))


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _precision(config: CLIPTextConfig | CLIPVisionConfig) -> Any:
    return jax.default_matmul_precision(
        "highest" if config.compute_dtype == "float32" else "default"
    )


def _through(layers: nnx.Module, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    graphdef, params = nnx.split(layers)
    return jax.lax.scan(lambda x, p: (nnx.merge(graphdef, p)(x), None), x, params)[0]


_Sizes = CLIPTextConfig | CLIPVisionConfig
_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class _Layer(nnx.Module):
    """The residual stream and the norms are float32, what is between computes in compute_dtype."""

    def __init__(self, config: _Sizes, rngs: nnx.Rngs):
        self.config = config
        self.layer_norm1 = _layer_norm(config, rngs)
        self.self_attn = _Attention(config, rngs)
        self.layer_norm2 = _layer_norm(config, rngs)
        self.mlp = _FeedForward(config, rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        dtype = self.config.compute_dtype
        x = x + self.self_attn(self.layer_norm1(x).astype(dtype)).astype(jnp.float32)
        return x + self.mlp(self.layer_norm2(x).astype(dtype)).astype(jnp.float32)


class _Attention(nnx.Module):
    """A token of a text sees itself and those before; patches see all."""

    def __init__(self, config: _Sizes, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.causal = isinstance(config, CLIPTextConfig)
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        b, length, width = x.shape
        q, k, v = (
            y.reshape(b, length, self.heads, -1)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        logits = logits * (width // self.heads) ** -0.5
        if self.causal:
            logits = jnp.where(np.tri(length, dtype=bool), logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return self.out_proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class _FeedForward(nnx.Module):
    def __init__(self, config: _Sizes, rngs: nnx.Rngs):
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.fc2(self.activation(self.fc1(x)))


def _layer_norm(config: _Sizes, rngs: nnx.Rngs) -> nnx.LayerNorm:
    width, epsilon = config.hidden_size, config.layer_norm_eps
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
