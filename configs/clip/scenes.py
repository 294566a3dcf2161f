"""A CLIP of scenes: pictures of 64 px and their captions in one space.

cascade train configs/clip/scenes.py --workdir runs/clip
cascade sample "two red circles" --best-of 8 --clip runs/clip/clip
"""

from cascade.models import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from cascade.scenes.dataset import ScenesData
from cascade.training.clip_training import CLIPTraining
from cascade.training.job import Optimizer


def config() -> CLIPTraining:
    return CLIPTraining(
        clip=CLIPConfig(
            text=CLIPTextConfig(
                vocab_size=1024,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=64,
                eos_token_id=2,
            ),
            vision=CLIPVisionConfig(
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=2,
                image_size=64,
                patch_size=8,
            ),
            projection_dim=96,
        ),
        data=ScenesData(split="train", size=1_000_000),
        validation=0.002,
        images=200_000,
        batch_size=128,
        optimizer=Optimizer(
            name="adamw",
            learning_rate=1e-3,
            warmup_images=10_000,
            cooldown_images=120_000,
            weight_decay=0.05,
            b2=0.98,
        ),
        ema_decay=0.998,
        log_every_images=2_000,
        save_every_images=10_000,
        preview_every_images=20_000,
    )
