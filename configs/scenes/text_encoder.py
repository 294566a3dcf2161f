"""The small text encoder of the scenes cascade: a T5 v1.1 pretrained on captions of drawn scenes.

cascade train configs/scenes/text_encoder.py --workdir runs/text_encoder
"""

from cascade.models.t5 import T5Config
from cascade.text_pretraining import TextPretraining


def config() -> TextPretraining:
    return TextPretraining(
        encoder=T5Config(
            vocab_size=1024,
            d_model=128,
            d_kv=32,
            d_ff=320,
            num_layers=4,
            num_decoder_layers=2,
            num_heads=4,
            n_positions=64,
        ),
        documents=256_000,
    )
