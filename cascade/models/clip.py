"""CLIP's text transformer (Radford et al. 2021), whose last hidden states condition diffusion.

    x = token[ids] + position
    x = x + o(softmax(q(y) k(y)^T / sqrt(d)) v(y))   y = LN(x); a token sees itself and those before
    x = x + fc2(act(fc1(LN(x))))
    out = LN(x)

stable-diffusion-x4-upscaler has OpenCLIP's ViT-H without its last layer. Layers are equal, so their
parameters carry a leading layer axis and run under one `lax.scan`.
"""

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
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """The matrix products have this dtype."""

    def __post_init__(self):
        ranges.whole(self, 1, 2**22, "vocab_size")
        ranges.whole(self, 1, ranges.MOST_CHANNELS, "hidden_size", "intermediate_size")
        ranges.whole(self, 1, 1024, "num_hidden_layers", "num_attention_heads")
        ranges.whole(self, 2, 4096, "max_position_embeddings")
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

    def build(self, rngs: nnx.Rngs) -> "CLIPTextModel":
        """Make the network, with fresh float32 parameters."""
        return CLIPTextModel(self, rngs)

    @classmethod
    def from_hf_dict(cls, fields: Mapping[str, Any]) -> "CLIPTextConfig":
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
        config = self.config
        length = ids.shape[1]
        with jax.default_matmul_precision(
            "highest" if config.compute_dtype == "float32" else "default"
        ):
            x = self.token_embedding[...][ids] + self.position_embedding[...][:length]
            graphdef, params = nnx.split(self.layers)
            x, _ = jax.lax.scan(
                lambda x, p: (nnx.merge(graphdef, p)(x), None), x.astype(jnp.float32), params
            )
            return self.final_layer_norm(x)


_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class _Layer(nnx.Module):
    """The residual stream and the norms are float32, what is between computes in compute_dtype."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
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
    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
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
        logits = jnp.where(np.tri(length, dtype=bool), logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return self.out_proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class _FeedForward(nnx.Module):
    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.fc2(self.activation(self.fc1(x)))


def _layer_norm(config: CLIPTextConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    width, epsilon = config.hidden_size, config.layer_norm_eps
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
