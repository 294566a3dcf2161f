"""The x4 upscaler against diffusers 0.42 and transformers 5, live. Skipped without [parity]."""

import dataclasses
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cascade import cli
from cascade.models import Network, Signals
from cascade.published.x4_upscaler import reader as upscaler
from cascade.text import clip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
reference = importlib.import_module("fixtures.make_upscaler")
deepfloyd = importlib.import_module("fixtures.make_deepfloyd")
test_parity = importlib.import_module("test_parity")

published = test_parity.published
WIDE = reference.UNET | {
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "block_out_channels": [16, 8, 24],
    "only_cross_attention": [True, True, False],
}
UNETS = {
    "three levels, image first in the innermost": WIDE,
    "two blocks, four heads, text first throughout": WIDE
    | {"layers_per_block": 2, "attention_head_dim": 4, "only_cross_attention": True},
    "one block here and two there, projections by convolutions, image first throughout": WIDE
    | {
        "layers_per_block": [1, 2, 1],
        "only_cross_attention": False,
        "use_linear_projection": False,
    },
    "attention everywhere": WIDE
    | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": 1,
        "norm_num_groups": 8,
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_unets_equal_diffusers(name, tmp_path):
    fields = UNETS[name]
    theirs = deepfloyd.random_unet(fields)
    theirs.save_pretrained(tmp_path)
    inputs = reference.unet_inputs(fields, (8, 12))
    expected = deepfloyd.unet_output(theirs, inputs).transpose(0, 2, 3, 1)
    network = upscaler.unet(tmp_path)
    x, lowres = jnp.split(jnp.asarray(inputs["x"].transpose(0, 2, 3, 1)), [4], axis=-1)
    level = jnp.asarray(inputs["level"], jnp.float32)
    signals = Signals(
        channels=(lowres,), vectors=(level[:, None],), **test_parity.tokens(inputs["text"])
    )
    time = jnp.asarray(inputs["time"], jnp.float32)
    run = jax.jit(Network(network.config, *network.given).__call__)
    output = run(network.read("float32"), x, time, signals)
    assert np.abs(output - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [8, 4], "layers_per_block": 3, "norm_num_groups": 2},
        {"block_out_channels": [4, 8, 12, 16], "latent_channels": 3, "scaling_factor": 0.5},
    ],
)
def test_autoencoders_equal_diffusers(changes, tmp_path):
    levels = len(changes["block_out_channels"])
    fields = reference.VAE | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **changes,
    }
    theirs = reference.random_vae(fields)
    theirs.save_pretrained(tmp_path)
    latents = reference.noise(1, (2, 3, 5, fields.get("latent_channels", 4)))
    image = reference.noise(2, (2, 16, 24, 3))
    expected = reference.vae_outputs(theirs, latents, image)
    network = upscaler.autoencoder(tmp_path)
    params, bind = network.read("float32"), Network(network.config).bind
    for name, output in (
        ("decoded", jax.jit(lambda p, z: bind(p).decode(z))(params, latents)),
        ("encoded", jax.jit(lambda p, x: bind(p).encode(x))(params, image)),
    ):
        assert np.abs(output - expected[name]).max() < 1e-5 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "quick_gelu", "num_attention_heads": 2}, {"num_hidden_layers": 5}]
)
def test_text_encoders_equal_transformers(changes, tmp_path):
    """By the pipeline's own way from prompts to embeddings."""
    pipe = reference.pipeline(tmp_path / "tokenizer")
    pipe.text_encoder = reference.random_text_encoder(reference.TEXT | changes)
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    prompts = ["A red   circle above a CAFÉ, 10x!", "", "blue " * 90]
    encoder = clip.CLIPTextEncoder.load(tmp_path)
    with torch.no_grad():
        expected = pipe.encode_prompt(prompts, "cpu", 1, False)[0].numpy()
    found = encoder(prompts).values
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_networks_in_bfloat16_are_the_same_up_to_rounding(tmp_path):
    pipe = reference.pipeline(tmp_path / "made")
    pipe.save_pretrained(tmp_path / "saved")
    expected = np.load(reference.FOLDER / "outputs.npz")
    network = upscaler.autoencoder(tmp_path / "saved" / "vae")
    config = dataclasses.replace(network.config, compute_dtype="bfloat16")
    params = network.read("bfloat16")
    output = jax.jit(lambda p, z: Network(config).bind(p).decode(z))(params, reference.LATENTS)
    scale = np.abs(expected["decoded"]).max()
    assert 1e-4 * scale < np.abs(output - expected["decoded"]).max() < 0.1 * scale


def test_recorded_outputs_and_pictures_are_what_diffusers_gives():
    """Ours are compared with the records, in test_upscaler.py."""
    for name, found in (("outputs", reference.outputs()), ("pictures", reference.pictures())):
        recorded = np.load(reference.FOLDER / f"{name}.npz")
        assert sorted(found) == sorted(recorded.files)
        for key, value in found.items():
            np.testing.assert_allclose(value, recorded[key], atol=1e-5)


def test_published_pipelines_of_three_stages_are_sampled_converted_and_as_they_are(
    published, tmp_path, capsys
):
    """Through the console command, from folders as diffusers writes them: the same pictures."""
    stage1, stage2 = map(str, published)
    stage3, model = str(tmp_path / "x4"), str(tmp_path / "model")
    reference.pipeline(tmp_path / "tokenizer").save_pretrained(stage3, variant="fp16")
    run = [sys.executable, "-m", "cascade"]
    stages = ["--stage1", stage1, "--stage2", stage2, "--stage3", stage3]
    done = subprocess.run(
        [*run, "convert", "deepfloyd", *stages, model], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["stages"] == ["if8", "if16", "x4_64"]
    for name, given in (("a", model), ("b", f"{stage1},{stage2},{stage3}")):
        words = ["sample", "A red circle, 10x15", "--model", given, "--out", str(tmp_path / name)]
        subprocess.run([*run, *words, "--steps", "3", "--no-compilation-cache"], check=True)
    for side in (8, 16, 64):
        a, b = (np.asarray(Image.open(tmp_path / n / f"0000_{side}.png")) for n in "ab")
        assert a.shape == (side, side, 3) and a.std() > 10
        np.testing.assert_array_equal(a, b)
    record = json.loads((tmp_path / "a" / "0000.json").read_text())["stages"]["x4_64"]
    assert (record["guidance"], record["threshold"]["kind"]) == (9.0, "none")
    with pytest.raises(SystemExit):
        words = ["--model", model, "--out", str(tmp_path / "c"), "--threshold", "dynamic"]
        cli.main(["sample", "a", *words])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: --threshold dynamic: must be "none" in x4_64')
