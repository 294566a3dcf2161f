"""The networks, as pure functions of their parameters.

>>> network = Network(UNetConfig(levels=(Level(width=128, blocks=2),)))
>>> params = network.init(jax.random.key(0))  # nested dict of arrays
>>> y = network(params, x, time, Conditioning())
"""

from cascade.models.autoencoder import Autoencoder, AutoencoderConfig
from cascade.models.clip import CLIPTextConfig, CLIPTextModel
from cascade.models.conditioning import Conditioning
from cascade.models.efficient_unet import EfficientLevel, EfficientUNet, EfficientUNetConfig
from cascade.models.layers import placing
from cascade.models.network import Network
from cascade.models.unet import Level, UNet, UNetConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "CLIPTextConfig",
    "CLIPTextModel",
    "Conditioning",
    "EfficientLevel",
    "EfficientUNet",
    "EfficientUNetConfig",
    "Level",
    "Network",
    "UNet",
    "UNetConfig",
    "placing",
]
