"""The small text encoder of the scenes cascade: a T5 v1.1 pretrained on captions of drawn scenes.

cascade train configs/scenes/text_encoder.py --workdir runs/text_encoder

About four minutes on two CPU cores; it made the weights that ship (2 MB). On held-out captions of
several things, a linear map from the embedding of a shape's word tells that thing's colour in
99.8 % of cases (always the commonest: 11 %), its size or that none is said in 92 % (39 %), its
finish in 95 % (46 %). So short a run learns retelling only: filling masked spans from a paraphrase
is still at chance.
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
        examples=64_000,
    )
