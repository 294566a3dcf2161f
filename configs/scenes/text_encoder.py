"""The small text encoder of the scenes cascade: a T5 v1.1 pretrained on captions of drawn scenes.

    cascade train configs/scenes/text_encoder.py --workdir runs/text_encoder

Half an hour on one CPU core that is shared; it made the weights that ship (2 MB). In held-out
captions of two things a linear map from the embedding of a noun tells where its thing stands (left,
right, above or below) in 100% of cases, except where a later sentence says it: there the noun that
the later sentence repeats knows it, and its first mention does not (46 to 49%).
"""

from cascade.models.t5 import T5Config
from cascade.scenes.text_pretraining import TextPretraining


def config() -> TextPretraining:
    return TextPretraining(
        encoder=T5Config(
            vocab_size=1024,
            d_model=128,
            d_kv=16,
            d_ff=320,
            num_layers=4,
            num_decoder_layers=2,
            num_heads=8,
            n_positions=64,
        ),
        images=256_000,
        described=0.6,
        retold=0.3,
        hidden=0.9,
        learning_rate=3e-3,
        warmup_images=25_600,
    )
