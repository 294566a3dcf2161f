"""stable-diffusion-x4-upscaler: its networks, its readers, and the latent stage they make.

What diffusers computes is in fixtures/upscaler (see make_upscaler.py);
test_upscaler_parity.py asks it.
"""

import dataclasses
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures.random_weights import noise
from flax import nnx
from pipelines import UPSCALER, relative_error, write_pipeline, write_upscaler

from cascade.commands import convert
from cascade.devices.chips import chip_named
from cascade.diffusion import samplers
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.process import Discrete
from cascade.errors import UserError
from cascade.models import AutoencoderConfig, CLIPTextConfig, Network, Signals
from cascade.models.autoencoder import _Attention
from cascade.models.layers import attend
from cascade.planning import sampling
from cascade.planning.topology import Topology
from cascade.published.pipelines import pipelines
from cascade.published.x4_upscaler import reader as readers
from cascade.published.x4_upscaler import stage as upscaler
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.stage import Stage, TextInput
from cascade.storage import network as published
from cascade.storage import weights
from cascade.text import clip
from cascade.training.stage_training import StageTraining

FIXTURES = Path(__file__).parents[1] / "fixtures" / "upscaler"
PUBLISHED = json.loads(gzip.decompress((FIXTURES / "published_shapes.json.gz").read_bytes()))
OUTPUTS, PICTURES = np.load(FIXTURES / "outputs.npz"), np.load(FIXTURES / "pictures.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_upscaler(tmp_path_factory.mktemp("upscaler"))


def test_every_tensor_of_the_published_networks_has_one_place(tmp_path):
    networks = {
        "unet": readers.unet_config,
        "vae": readers.autoencoder_config,
        "text_encoder": CLIPTextConfig.from_hf_dict,
    }
    for name, parse in networks.items():
        shapes, config = PUBLISHED[name]["shapes"], parse(PUBLISHED[name]["config"])
        given = (config.widths,) if name == "unet" else ()
        target = Network(config, *given).abstract()
        find = clip.origins if name == "text_encoder" else published.by_name
        origins = find(target, shapes)
        weights.fit(name, shapes, origins, target)
        assert sorted(n for o in origins.values() for n in o.names) == sorted(shapes)


def quiet(params, network):
    """The same network with `quiet_tensors` for weights."""
    origins = published.by_name(network.abstract())

    def scaled(path, leaf):
        name = origins[jax.tree_util.keystr(path, simple=True, separator="/")].names[0]
        return leaf if "norm" in name else leaf * np.float32(0.02)

    return jax.tree.map_with_path(scaled, params)


def test_the_unet_equals_the_reference_implementation(folder):
    network = readers.unet(folder / "unet")
    rng = np.random.default_rng(0)  # as make_upscaler.unet_inputs
    x = rng.standard_normal((2, 7, 4, 8)).astype(np.float32).transpose(0, 2, 3, 1)
    text = (rng.standard_normal((2, 5, 12)) + 1).astype(np.float32)
    signals = Signals(
        channels=(jnp.asarray(x[..., 4:]),),
        vectors=(jnp.array([[350.0], [20]]),),
        tokens=jnp.asarray(text),
        mask=jnp.ones(text.shape[:2], bool),
    )
    run = jax.jit(Network(network.config, *network.given).__call__)
    params = network.read("float32")
    # Quiet weights show a wrong epsilon.
    for name, values in (("unet", params), ("quiet_unet", quiet(params, network))):
        output = run(values, x[..., :4], jnp.array([963.0, 1.0]), signals)
        assert relative_error(np.asarray(output), OUTPUTS[name]) < 2e-6, name


def test_remat_wraps_every_block_and_changes_no_value(folder):
    network = readers.unet(folder / "unet")
    config, params = network.config, network.read("float32")
    x, picture = jnp.asarray(noise(1, (1, 4, 6, 4))), jnp.asarray(noise(2, (1, 4, 6, 3)))
    signals = Signals(
        channels=(picture,),
        vectors=(jnp.array([[20.0]]),),
        tokens=jnp.asarray(noise(3, (1, 5, 12))),
        mask=jnp.ones((1, 5), bool),
    )
    outputs = []
    # Down 1 + 1, middle 2, up 2 + 2 residual blocks; 1 + 1 + 2 transformer blocks.
    for c, blocks in ((config, 0), (dataclasses.replace(config, remat="dots_saveable"), 8 + 4)):
        run = Network(c, *network.given)
        assert jax.tree.map(jnp.shape, run.abstract()) == jax.tree.map(jnp.shape, params)
        jaxpr = jax.make_jaxpr(run.__call__)(params, x, jnp.array([963.0]), signals)
        assert sum(e.primitive.name in ("checkpoint", "remat2") for e in jaxpr.eqns) == blocks
        outputs.append(jax.jit(run.__call__)(params, x, jnp.array([963.0]), signals))
    np.testing.assert_array_equal(*outputs)


def test_the_autoencoder_equals_the_reference_implementation(folder):
    network = readers.autoencoder(folder / "vae")
    params, bind = network.read("float32"), Network(network.config).bind
    decode = jax.jit(lambda params, z: bind(params).decode(z))
    encode = jax.jit(lambda params, x: bind(params).encode(x))
    for name, values in (("", params), ("quiet_", quiet(params, network))):
        decoded, encoded = (
            decode(values, noise(1, (1, 3, 5, 4))),
            encode(values, noise(2, (1, 8, 12, 3))),
        )
        assert relative_error(np.asarray(decoded), OUTPUTS[f"{name}decoded"]) < 2e-6, name
        assert relative_error(np.asarray(encoded), OUTPUTS[f"{name}encoded"]) < 2e-6, name


def test_the_text_encoder_equals_the_reference_implementation(folder):
    encoder = clip.CLIPTextEncoder.load(folder)
    ids = np.array([[527, 5, 400, 513, 9, 528, 0, 0], [527, 528, 0, 0, 0, 0, 0, 0]], np.int32)
    found = encoder.embed(clip.Tokens(ids=ids, mask=ids > 0)).values
    assert relative_error(np.asarray(found), OUTPUTS["text"]) < 2e-6


def test_prompts_become_the_tokens_of_transformers(folder, tmp_path):
    encoder = clip.CLIPTextEncoder.load(folder)
    texts = ["", "A red   circle, 10x café!!", "blue " * 75, "blue " * 76, "a <|endoftext|> b"]
    expected = encoder.tokenizer(texts, padding="max_length", max_length=77, truncation=True)
    tokens = encoder.tokenize(texts)
    np.testing.assert_array_equal(tokens.ids, expected["input_ids"])
    np.testing.assert_array_equal(tokens.mask, expected["attention_mask"])
    assert tokens.truncated.tolist() == [False, False, False, True, False]
    assert tokens.ids[0].tolist() == [527, 528] + [0] * 75
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")  # transformers 5: one tokenizer.json
    again = clip.read_tokenizer(tmp_path / "tokenizer", 529)
    assert again(texts)["input_ids"] == encoder.tokenizer(texts)["input_ids"]


def test_older_spellings_are_read_alike(folder, tmp_path):
    older = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }

    def renamed(name):
        if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
            return f"text_model.{name}"
        if ".mid_block." in name:  # the autoencoder's; that of the U-Net begins with it
            for now, then in older.items():
                name = name.replace(now, then)
        return name

    write_upscaler(tmp_path, renamed=renamed)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    safetensors.numpy.save_file(tensors, file)
    for find in (lambda f: readers.autoencoder(f / "vae"), clip.text_encoder):
        now, then = find(folder), find(tmp_path)
        with now.opened() as (a, _), then.opened() as (b, _):
            assert sorted(a.shapes) != sorted(b.shapes)
        jax.tree.map(np.testing.assert_array_equal, now.read("float32"), then.read("float32"))


def test_everything_missing_misshapen_or_left_over_is_listed(folder):
    shapes = dict(UPSCALER["shapes"]["vae"])
    del shapes["encoder.mid_block.attentions.0.to_k.bias"]
    shapes["decoder.conv_in.weight"] = [8, 3, 3, 3]
    shapes["decoder.up_blocks.9.resnets.0.norm1.weight"] = [8]
    with pytest.raises(UserError) as e:
        readers.autoencoder(folder / "vae").fit("autoencoder x", shapes)
    for expected in (
        "encoder.mid_block.attentions.0.to_k.bias is missing",
        "decoder.conv_in.weight is [8, 3, 3, 3], expected [8, 4, 3, 3]",
        "decoder.up_blocks.9.resnets.0.norm1.weight is left over",
    ):
        assert expected in str(e.value)


@pytest.mark.parametrize(
    "file,field,value",
    [
        ("unet/config.json", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet/config.json", "act_fn", "gelu"),
        ("unet/config.json", "num_class_embeds", None),
        ("unet/config.json", "transformer_layers_per_block", 2),
        ("unet/config.json", "only_cross_attention", [True] * 3),
        ("unet/config.json", "encoder_hid_dim", 7),
        ("vae/config.json", "_class_name", "AsymmetricAutoencoderKL"),
        ("vae/config.json", "down_block_types", ["AttnDownEncoderBlock2D"]),
        ("vae/config.json", "shift_factor", 0.1),
        ("text_encoder/config.json", "model_type", "t5"),
        ("text_encoder/config.json", "hidden_act", "relu"),
        ("text_encoder/config.json", "hidden_size", 15),
        ("scheduler/scheduler_config.json", "_class_name", "EulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", "prediction_type", "flow"),
        ("model_index.json", "max_noise_level", 360),
    ],
)
def test_another_models_config_is_refused_by_file_and_field(tmp_path, file, field, value):
    write_upscaler(tmp_path, [(file, field, value)])
    with pytest.raises(UserError, match=rf"^{tmp_path / file}: .*{field} must"):
        pipelines([tmp_path])


def test_pickles_and_missing_vocabularies_are_refused_with_the_way_out(tmp_path):
    write_upscaler(tmp_path)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    (pipeline,) = pipelines([tmp_path])
    with pytest.raises(
        UserError, match=r"autoencoder .*model\.bin.*never read.*AutoencoderKL as M"
    ):
        pipeline.params()
    (tmp_path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"tokenizer: merges.txt is missing"):
        clip.CLIPTextEncoder.load(tmp_path)


def test_the_stage_has_the_published_settings(folder):
    (pipeline,) = pipelines([folder])
    config = pipeline.config
    assert (config.name, config.resolution, config.lowres_resolution) == ("x4_1024", 1024, 256)
    assert (config.sampling.steps, config.sampling.guidance) == (75, 9.0)
    assert config.sampling.threshold == Threshold(kind="none")
    assert config.space.autoencoder.scaling == 0.08333
    schedule = Discrete(betas="scaled linear")
    assert config.schedule == config.lowres.augmentation.schedule == schedule
    times = config.sampling.grid(75, config.schedule)
    entries = np.asarray(schedule.entry(schedule.logsnr(times))).tolist()
    assert entries == [*range(963, 0, -13), 0]  # the last is no step's: DDIM ends there
    levels = [upscaler.stage_config(folder, low).sampling.aug_level for low in (None, 8)]
    assert np.asarray(schedule.entry(schedule.logsnr(jnp.array(levels)))).tolist() == [20, 100]


def test_what_latents_cannot_have_is_refused(folder):
    config = upscaler.stage_config(folder, 8)
    for change, message in (
        ({"threshold": Threshold()}, 'threshold must be "none" in x4_32.*no range'),
        ({"aug_level": 0.352}, "aug_level of x4_32 must be at most 0.351"),
        ({"steps": 1000}, "begin at entry 1000, beyond"),
    ):
        with pytest.raises(ValueError, match=message):
            config.check(dataclasses.replace(config.sampling, **change))
    with pytest.raises(ValueError, match="stage x4_32 diffuses in Latents: .* not trained"):
        StageTraining(stage=config, data=ScenesData(), images=8, batch_size=8)
    wider = dataclasses.replace(config.space.autoencoder, latent_channels=8)
    with pytest.raises(ValueError, match="in_channels must be the 8 channels of Latents, got 4"):
        dataclasses.replace(config, space=dataclasses.replace(config.space, autoencoder=wider))
    with pytest.raises(ValueError, match="resolution must be a multiple of 4, .* got 30"):
        dataclasses.replace(config.space, resolution=30)
    adding = dataclasses.replace(config.lowres, residual=True)
    with pytest.raises(ValueError, match="residual adds to a picture, which .* Latents is not"):
        dataclasses.replace(config, prediction="x0", conditions=(adding, config.text))


def test_attention_over_many_pixels_in_parts_is_attention_over_all():
    config = AutoencoderConfig(widths=(4,), blocks=1, groups=1, scaling=1.0)
    layer = _Attention(config, 4, nnx.Rngs(0))

    def whole(x):
        y = layer.group_norm(x).reshape(2, -1, 4)
        y = attend(layer.to_q(y), layer.to_k(y), layer.to_v(y), None, 4)
        return x + layer.to_out[0](y).reshape(x.shape)

    x = jnp.asarray(noise(5, (2, 33, 40, 4)))  # 1320 pixels: two parts
    np.testing.assert_allclose(*jax.jit(lambda x: (layer(x), whole(x)))(x), atol=1e-5)


def test_the_stage_draws_what_the_pipeline_draws(folder, monkeypatch):
    """As close to what the reference computes in float64 as its own float32 is, from the picture
    and its noise to the pixels. Its DDIM leaves a last trace of noise in the latents."""
    stage = Stage(upscaler.stage_config(folder, 8))
    settings = dataclasses.replace(stage.config.sampling, steps=12)
    params = upscaler.UpscalePipeline(folder=folder, config=stage.config).params()
    # The picture's noise has its 3 channels, that of the latents 4.
    monkeypatch.setattr(
        samplers,
        "initial_noise",
        lambda keys, shape: jnp.asarray(noise(shape[-1] - 3, (1, *shape))),
    )
    text, negative = (
        TextInput(jnp.asarray(noise(k, (1, 7, 12)) + np.float32(0.5)), jnp.ones((1, 7), bool))
        for k in (201, 202)
    )
    low = jnp.clip(noise(203, (1, 8, 8, 3)), -1, 1)
    drawn = stage.sample(
        params,
        {"text": text, "lowres": (low,)},
        jax.random.split(jax.random.key(0), 1),
        settings=settings,
        negative={"text": negative},
        sides=(32, 32),
    )
    exact, theirs = PICTURES["picture_exact"], PICTURES["picture"]
    found = np.clip(np.asarray(drawn[0]) / 2 + 0.5, 0, 1)
    error, rounding = (np.abs(picture - exact).max() for picture in (found, theirs))
    assert error < 4 * rounding < 1e-4
    assert 0.2 < exact.std()


def test_a_third_stage_is_sampled_as_it_is_and_converted_alike(folder, tmp_path, monkeypatch):
    first = write_pipeline(tmp_path / "IF-I", 1)
    report = convert.convert_deepfloyd(
        convert.DeepFloydOptions(out=tmp_path / "model", stage1=str(first), stage3=str(folder))
    )
    assert report["stages"] == ["if8", "x4_32"]
    low = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    drawn = []
    for name in (tmp_path / "model", f"{first},{folder}"):
        cascade = Cascade.load(name)
        assert list(cascade.own_encoders) == ["x4_32"]
        (picture,) = cascade("a red circle", lowres=low, steps=2)
        drawn.append(picture.image)
    assert drawn[0].shape == (32, 32, 3) and drawn[0].std() > 10
    np.testing.assert_array_equal(*drawn)
    # Its prompt reaches it, though what encodes it is not the first stage's T5.
    (other,) = cascade("blue", lowres=low, steps=2)
    assert (other.image != drawn[0]).any()
    # A plan knows all parts, in the other dtype too.
    programs = []

    def compiled(jitted, shapes, topology):
        programs.append(jax.make_jaxpr(jitted)(*shapes).out_avals[0].shape)
        return {"temporary_bytes": 0.0, "peak_bytes": 9.0 - len(programs)}

    monkeypatch.setattr(sampling, "compiled", compiled)
    topology = Topology("simulated", chip_named("v5e"), 1, jax.devices()[:1])
    options = {"batch_size": 3, "dtype": "bfloat16", "int8": False}
    planned = sampling.plan_model(str(tmp_path / "model"), topology, **options)
    assert list(planned["parts"]) == ["text encoder", "x4_32 text encoder", "if8", "x4_32"]
    assert programs == [(3, 77, 16), (3, 77, 12), (3, 8, 8, 3), (3, 32, 32, 3)]
    assert planned["largest_bytes"] == 8.0 and planned["fits_part_by_part"]
    clip_params = cascade.own_encoders["x4_32"].params
    for name, params in (("x4_32", cascade.stages[1][1]), ("x4_32 text encoder", clip_params)):
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert planned["parts"][name]["weight_bytes"] == 2 * count
    topology = dataclasses.replace(topology, devices=None)
    alone = sampling.plan_model(str(folder), topology, **options)
    assert list(alone["parts"]) == ["x4_1024 text encoder", "x4_1024"]


def test_converted_in_half_precision_it_is_read_in_any(folder, tmp_path):
    out = tmp_path / "model"
    convert.convert_deepfloyd(
        convert.DeepFloydOptions(out=out, stage3=str(folder), dtype="float16")
    )
    config = upscaler.stage_config(folder)
    whole = upscaler.UpscalePipeline(folder=folder, config=config).params()
    half = open_model(out).read(config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float16), b), whole, half)
    with safetensors.safe_open(
        out / "x4_1024" / "text_encoder" / "model.safetensors", "np"
    ) as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
