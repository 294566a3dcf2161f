"""A small text encoder made of your own captions, for training where there is no T5 at hand.

    cascade train configs/text_encoder_own.py --data folder:pictures --workdir runs/words

A T5 v1.1 of 0.9M parameters that knows the words of these captions and no others, in
runs/words/text_encoder. It learns to tell captions anew and to fill what is hidden of them; no
picture is looked at. A stage is then trained with --text-encoder runs/words/text_encoder; its
conditions have the encoder's width of 128, as in configs/tiny/base64.py. FINETUNE.md says when to
do so.

As a trial, from 4000 captions of scenes: after 12,800 examples (--images 12800 --warmup-images
3200), under two minutes on two cores that were shared, a linear map reads from the embedding of
"circle", in "a red circle above a blue square", its colour in 300 of 300 cases. Chance is a tenth,
and a bag of words, which knows both colours but not whose they are, gets 55%.
"""

from cascade.data import FolderData
from cascade.models.t5 import T5Config
from cascade.training.text_training import TextTraining


def config() -> TextTraining:
    return TextTraining(
        data=FolderData(path="pictures"),
        encoder=T5Config(
            vocab_size=4096,
            d_model=128,
            d_kv=16,
            d_ff=320,
            num_layers=4,
            num_decoder_layers=2,
            num_heads=8,
            n_positions=128,
        ),
        images=64_000,
        retold=0.6,
        hidden=0.9,
        length=128,
        learning_rate=3e-3,
        warmup_images=6_400,
    )
