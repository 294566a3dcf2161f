"""The networks. They know no diffusion process, no mesh and no application.

network         the contract of a network, and a network as a pure function of its parameters
signals         the three ways in which a network is told things
layers, blocks  what networks are built from
unet            Imagen's base, text to 64 px
efficient_unet  Imagen's super-resolution
autoencoder     pictures to latents and back
t5, clip        text encoders, and pictures where texts are
inception       the features of FID
"""

from cascade.models.autoencoder import Autoencoder, AutoencoderConfig
from cascade.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
)
from cascade.models.efficient_unet import EfficientLevel, EfficientUNet, EfficientUNetConfig
from cascade.models.inception import Inception, InceptionConfig
from cascade.models.layers import placing
from cascade.models.network import Network, NetworkConfig
from cascade.models.signals import Signals, Widths
from cascade.models.unet import Level, UNet, UNetConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "CLIPConfig",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPVisionConfig",
    "EfficientLevel",
    "EfficientUNet",
    "EfficientUNetConfig",
    "Inception",
    "InceptionConfig",
    "Level",
    "Network",
    "NetworkConfig",
    "Signals",
    "UNet",
    "UNetConfig",
    "Widths",
    "placing",
]
