"""Against PyTorch, diffusers 0.42 and transformers 5, live. Skipped without the extra [parity]."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cascade import cli
from cascade.models import Network, Signals
from cascade.published.deepfloyd import reader as deepfloyd
from cascade.text import T5Encoder, captions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
reference = importlib.import_module("fixtures.make_deepfloyd")

T5 = Path(__file__).parents[1] / "fixtures" / "t5"
UNETS = {
    "stage I, three levels, two blocks": reference.TINY["stage1"]
    | reference.blocks([False, True, True])
    | {"block_out_channels": [8, 16, 24], "layers_per_block": 2, "attention_head_dim": 8},
    "stage I, one head as wide as the level": reference.TINY["stage1"]
    | {"attention_head_dim": 16, "layers_per_block": [2, 1], "act_fn": "silu"},
    "stage II, text only": reference.TINY["stage2"] | {"layers_per_block": [1, 3]},
    "stage II, hybrid by level": reference.TINY["stage2"]
    | reference.blocks([True, True])
    | {"only_cross_attention": [True, False]},
    "stage II, hybrid throughout": reference.TINY["stage2"] | {"only_cross_attention": False},
}


def tokens(text):
    """Those of Signals, all of which are seen."""
    return {"tokens": jnp.asarray(text), "mask": jnp.ones(text.shape[:2], bool)}


@pytest.mark.parametrize("name", UNETS)
def test_unets_equal_diffusers(name, tmp_path):
    fields = UNETS[name]
    theirs = reference.random_unet(fields)
    theirs.save_pretrained(tmp_path)
    side = 2 ** (len(fields["block_out_channels"]) - 1)
    inputs = reference.unet_inputs(fields, (2 * side, 3 * side))
    expected = reference.unet_output(theirs, inputs).transpose(0, 2, 3, 1)
    config, params = deepfloyd.read_unet(tmp_path)
    x = jnp.asarray(inputs["x"].transpose(0, 2, 3, 1))
    told = {}
    if config.lowres:
        x, lowres = jnp.split(x, 2, axis=-1)
        level = jnp.asarray(inputs["level"], jnp.float32)
        told = {"channels": (lowres,), "vectors": (level[:, None],)}
    signals = Signals(**tokens(inputs["text"]), **told)
    time = jnp.asarray(inputs["time"], jnp.float32)
    output = jax.jit(Network(config, config.widths).__call__)(params, x, time, signals)
    assert np.abs(output - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_unet_in_bfloat16_is_the_same_up_to_rounding(tmp_path):
    fields = reference.TINY["stage1"]
    theirs = reference.random_unet(fields)
    theirs.save_pretrained(tmp_path)
    inputs = reference.unet_inputs(fields, (4, 6))
    expected = reference.unet_output(theirs, inputs).transpose(0, 2, 3, 1)
    config, params = deepfloyd.read_unet(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    x = jnp.asarray(inputs["x"].transpose(0, 2, 3, 1))
    time, signals = jnp.array([990.0, 7.0]), Signals(**tokens(inputs["text"]))
    output = jax.jit(Network(config, config.widths).__call__)(params, x, time, signals)
    assert 1e-4 < np.abs(output - expected).max() / np.abs(expected).max() < 0.1


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_a_full_t5_checkpoint_gives_its_encoder(tmp_path, shard):
    """Like google/t5-v1_1-*: decoder and head beside the encoder, in one file or several."""
    fields = json.loads((T5 / "config.json").read_text()) | {"is_encoder_decoder": True}
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**fields)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn_like(p) + (1.0 if p.ndim == 1 else 0.0))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    (tmp_path / "spiece.model").write_bytes((T5 / "spiece.model").read_bytes())
    encoder = T5Encoder.load(tmp_path, 20)
    tokens = encoder.tokenize(["a small red circle", ""])
    with torch.no_grad():
        expected = theirs.encoder(
            torch.tensor(tokens.ids), attention_mask=torch.tensor(tokens.mask).long()
        ).last_hidden_state.numpy()
    found = encoder.embed(tokens).values
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_captions_equal_diffusers():
    pipeline = object.__new__(diffusers.IFPipeline)
    texts = reference.CAPTIONS
    for rule, cleaned in (("clean", True), ("lower", False)):
        expected = pipeline._text_preprocessing(texts, clean_caption=cleaned)
        assert [captions.prepared(text, rule) for text in texts] == expected


def test_recorded_pictures_are_what_the_pipelines_draw():
    """Ours are compared with the records, in test_deepfloyd.py."""
    recorded = np.load(reference.FOLDER / "pictures.npz")
    found = reference.pictures()
    assert sorted(found) == sorted(recorded.files)
    for name, picture in found.items():
        np.testing.assert_allclose(picture, recorded[name], atol=1e-4)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two random pipelines on disk, as DeepFloyd publishes them: (stage I, stage II)."""
    root = tmp_path_factory.mktemp("published")
    folders = root / "IF-I", root / "IF-II"
    for stage, folder in enumerate(folders, 1):
        reference.pipeline(stage).save_pretrained(folder, variant="fp16")
    transformers.T5EncoderModel.from_pretrained(T5).save_pretrained(folders[0] / "text_encoder")
    (folders[0] / "tokenizer").mkdir()
    (folders[0] / "tokenizer" / "spiece.model").write_bytes((T5 / "spiece.model").read_bytes())
    return folders


def test_text_is_embedded_as_the_pipeline_embeds_it(published):
    pipe = reference.pipeline(1)
    pipe.tokenizer = transformers.T5Tokenizer.from_pretrained(T5)
    pipe.text_encoder = transformers.T5EncoderModel.from_pretrained(T5, dtype=torch.float32)
    prompt = "  A <b>Small</b> red CIRCLE — 10x15, above www.example.com/x a blue square!!"
    expected, empty = pipe.encode_prompt(prompt, clean_caption=True)
    encoder = T5Encoder.load(published[0], 77, captions="clean")
    found = encoder([prompt, ""]).values
    assert np.abs(found[:1] - expected.detach().numpy()).max() < 1e-4
    assert np.abs(found[1:] - empty.detach().numpy()).max() < 1e-4


def test_published_pipelines_are_sampled_converted_and_as_they_are(published, tmp_path):
    """Through the console command: the same pictures either way."""
    stage1, stage2 = map(str, published)
    model, steps = str(tmp_path / "model"), ["--steps", "3", "--no-compilation-cache"]
    run = [sys.executable, "-m", "cascade"]
    done = subprocess.run(
        [*run, *("convert", "deepfloyd", "--stage1", stage1, "--stage2", stage2, model)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["stages"] == ["if8", "if16"]
    prompt = "A red circle, 10x15"
    for name, given in (("a", model), ("b", f"{stage1},{stage2}")):
        words = ["sample", prompt, "--model", given, "--out", str(tmp_path / name), *steps]
        subprocess.run([*run, *words], capture_output=True, text=True, check=True)
    for side in (8, 16):
        a, b = (np.asarray(Image.open(tmp_path / n / f"0000_{side}.png")) for n in "ab")
        assert a.shape == (side, side, 3) and a.std() > 10
        np.testing.assert_array_equal(a, b)


def test_a_pipeline_that_is_not_if_is_one_line(published, tmp_path, capsys):
    for file, field, value in (
        ("model_index.json", "_class_name", "StableDiffusionPipeline"),
        ("scheduler/scheduler_config.json", "_class_name", "PNDMScheduler"),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid"),
        ("unet/config.json", "sample_size", 9),
    ):
        copy = tmp_path / f"{Path(file).stem}-{field}-{value}"
        subprocess.run(["cp", "-r", str(published[0]), str(copy)], check=True)
        fields = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(fields | {field: value}))
        with pytest.raises(SystemExit):
            cli.main(["sample", "a", "--model", str(copy), "--out", str(tmp_path / "out")])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and f"{copy / file}: {field} must be" in line, line
