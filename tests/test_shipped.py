"""What ships: its configs are those of its recipe, its size, its colours."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade import images
from cascade.config import load
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import SHIPPED, open_model
from cascade.scenes.captions import caption_at
from cascade.scenes.render import render
from cascade.stage import TextInput

CONFIGS = Path(__file__).parent.parent / "configs" / "scenes"


@pytest.mark.parametrize("name", ["base64", "sr256", "sr1024"])
def test_a_stage_that_ships_is_what_its_config_trains(name):
    (shipped,) = [stage for stage in open_model("scenes").stages if stage.name == name]
    assert shipped == load(str(CONFIGS / f"{name}.py")).stage


def test_the_weights_that_ship_take_at_most_32_mb():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*.safetensors")) <= 32e6


def test_super_resolution_leaves_a_white_background_white():
    """Stripes overshoot the range; a dynamic threshold would dim the whole picture for it."""
    scene, said = caption_at(1234, 5, "seen")
    picture = render(scene, 256).astype(float)
    cascade = Cascade.load("scenes")
    stage, params = cascade.stages[1]
    text = cascade.encoder([said.text])
    low = images.to_float(render(scene, 64)[None])
    drawn = stage.sample(
        params,
        {"text": TextInput(text.values, text.mask), "lowres": (jnp.asarray(low),)},
        jax.random.split(jax.random.key(0), 1),
        settings=stage.config.sampling,
    )
    background = np.all(picture == 242, axis=-1)
    assert background.mean() > 0.5
    assert abs(images.to_uint8(drawn)[0][background].mean() - 242) < 2
