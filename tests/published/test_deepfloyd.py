"""Public DeepFloyd IF weights: the network, and readers that take all of a file or say what not.

What diffusers computes is in fixtures/deepfloyd (see make_deepfloyd.py); test_parity.py asks it.
"""

import dataclasses
import functools
import gzip
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures.random_weights import noise
from pipelines import FIXTURES, NAME, UNETS, relative_error, write_pipeline, write_unet

from cascade import images
from cascade.commands import convert
from cascade.devices.sharding import MeshConfig, make_mesh, shardings
from cascade.diffusion import samplers
from cascade.diffusion.process import Discrete
from cascade.errors import OptionError, UserError
from cascade.models import Network, Signals
from cascade.models.t5 import T5Config
from cascade.published.deepfloyd import reader as deepfloyd
from cascade.published.deepfloyd.stage import stage_config
from cascade.published.pipelines import pipelines
from cascade.runner.cascade import Cascade
from cascade.runner.overrides import override
from cascade.stage import Stage, TextInput
from cascade.storage import network as published
from cascade.storage import weights
from cascade.text import t5

PUBLISHED = json.loads(
    gzip.decompress((FIXTURES / "deepfloyd" / "published_shapes.json.gz").read_bytes())
)


@functools.cache
def inputs(name):
    """The inputs of make_deepfloyd.unet_inputs, channels last: (x, time, Signals)."""
    config = UNETS[name]["config"]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, config["in_channels"], 4, 6)).astype(np.float32)
    text = (rng.standard_normal((2, 5, config["encoder_hid_dim"])) + 1).astype(np.float32)
    x = x.transpose(0, 2, 3, 1)
    lowres, level = jnp.asarray(x[..., 3:]), jnp.array([[250.0], [0.0]])
    signals = Signals(
        channels=(lowres,) if name == "stage2" else (),
        vectors=(level,) if name == "stage2" else (),
        tokens=jnp.asarray(text),
        mask=jnp.ones(text.shape[:2], bool),
    )
    return jnp.asarray(x[..., :3]), jnp.array([990.0, 7.0]), signals


def run(config, params, name):
    network = Network(config, config.widths)
    return np.asarray(jax.jit(network.__call__)(params, *inputs(name)))


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """(folder, config, params) of the tiny stage I."""
    folder = tmp_path_factory.mktemp("stage1") / "unet"
    write_unet(folder)
    return folder, *deepfloyd.read_unet(folder)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_the_unet_equals_the_reference_implementation(name, tmp_path):
    write_unet(tmp_path, name)
    expected = np.array(UNETS[name]["output"]).transpose(0, 2, 3, 1)
    output = run(*deepfloyd.read_unet(tmp_path), name)
    # An epsilon of 1e-6 in the norms, or sqrt(2) for IF's 1 / .7071, would be 4e-6 and 8e-6 off.
    assert relative_error(output, expected) < 2e-6


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith("IF")])
def test_every_tensor_of_a_published_unet_has_one_place(name):
    config = deepfloyd.unet_config(PUBLISHED[name]["config"])
    shapes, target = PUBLISHED[name]["shapes"], Network(config, config.widths).abstract()
    origins = published.by_name(target)
    weights.fit(name, shapes, origins, target)
    assert sorted(n for o in origins.values() for n in o.names) == sorted(shapes)


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith("t5")])
def test_every_tensor_of_a_published_t5_has_one_place(name):
    config = T5Config.from_hf_dict(PUBLISHED[name]["config"])
    shapes = PUBLISHED[name]["shapes"]
    tied, encoder = t5.EMBEDDING[1], dict(shapes)
    del encoder[tied]
    used = [n for o in t5.check(name, shapes, config).values() for n in o.names]
    assert sorted(used) == sorted(encoder)
    # A full checkpoint; and either name of the embedding alone.
    decoder = {f"decoder.{n.removeprefix('encoder.')}": s for n, s in encoder.items()}
    t5.check(name, shapes | decoder | {"lm_head.weight": shapes[tied]}, config)
    del shapes["shared.weight"]
    t5.check(name, shapes, config)
    with pytest.raises(UserError, match=r"encoder.block.0.extra is left over"):
        t5.check(name, shapes | {"encoder.block.0.extra": [1]}, config)


def test_everything_missing_misshapen_or_left_over_is_listed(stage1):
    folder, config, _ = stage1
    shapes = dict(UNETS["stage1"]["shapes"])
    del shapes["mid_block.attentions.0.to_k.weight"], shapes["conv_out.bias"]
    shapes["conv_in.weight"] = [8, 4, 3, 3]
    shapes["up_blocks.0.resnets.9.norm1.weight"] = [8]
    target = Network(config, config.widths).abstract()
    with pytest.raises(UserError) as e:
        weights.fit("U-Net x", shapes, published.by_name(target), target)
    for expected in (
        "U-Net x: ",
        "mid_block.attentions.0.to_k.weight is missing",
        "conv_out.bias is missing",
        "conv_in.weight is [8, 4, 3, 3], expected [8, 3, 3, 3]",
        "up_blocks.0.resnets.9.norm1.weight is left over",
    ):
        assert expected in str(e.value)


def split(tensors, folder, index, shards):
    """The tensors over two files, and the index that lists them."""
    (folder / f"{NAME}.safetensors").unlink()
    names = sorted(tensors)
    parts = dict(zip(shards, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        half = {n: tensors[n].astype(np.float16) for n in part}
        safetensors.numpy.save_file(half, folder / file)
    listed = {n: file for file, part in parts.items() for n in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


@pytest.mark.parametrize(
    "index,shards",
    [
        (f"{NAME}.safetensors.index.json", "{}-0000{}-of-00002.safetensors"),
        (f"{NAME}.safetensors.index.fp16.json", "{}.fp16-0000{}-of-00002.safetensors"),
        (f"{NAME}.fp16.safetensors.index.json", "{}-0000{}-of-00002.fp16.safetensors"),
        (None, "{}.fp16.safetensors"),
    ],
)
def test_shards_and_variants_in_both_spellings_are_read(tmp_path, stage1, index, shards):
    tensors = write_unet(tmp_path)
    if index:
        split(tensors, tmp_path, index, [shards.format(NAME, i) for i in (1, 2)])
    else:
        (tmp_path / f"{NAME}.safetensors").unlink()
        half = {n: t.astype(np.float16) for n, t in tensors.items()}
        safetensors.numpy.save_file(half, tmp_path / shards.format(NAME))
    params = deepfloyd.read_unet(tmp_path)[1]
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), stage1[2])
    jax.tree.map(np.testing.assert_array_equal, params, rounded)


def test_parameters_are_put_where_they_belong_and_are_the_same(stage1):
    folder, _, params = stage1
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    place = functools.partial(shardings, mesh=mesh)
    sharded = deepfloyd.read_unet(folder, shardings=place)[1]
    kernel = sharded["mid_block"]["resnets"]["0"]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    jax.tree.map(np.testing.assert_array_equal, sharded, params)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    write_unet(tmp_path)
    (tmp_path / f"{NAME}.safetensors").rename(tmp_path / f"{NAME}.bin")
    with pytest.raises(
        UserError, match=rf"{NAME}\.bin.*never read.*UNet2DConditionModel.*save_pre"
    ):
        deepfloyd.read_unet(tmp_path)


def test_half_a_download_is_one_line_that_names_the_file(tmp_path):
    tensors = write_unet(tmp_path)
    whole = (tmp_path / f"{NAME}.safetensors").read_bytes()
    (tmp_path / f"{NAME}.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"{NAME}.safetensors: damaged or cut short.*again"):
        deepfloyd.read_unet(tmp_path)
    index, shards = (
        f"{NAME}.safetensors.index.json",
        [f"{NAME}-0000{i}-of-00002.safetensors" for i in (1, 2)],
    )
    split(tensors, tmp_path, index, shards)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(UserError, match=rf"{shards[1]}, which {index} lists, is missing"):
        deepfloyd.read_unet(tmp_path)
    (tmp_path / index).unlink()
    with pytest.raises(UserError, match=rf"{shards[0]} is a shard, and {index} is missing"):
        deepfloyd.read_unet(tmp_path)


def test_quantized_weights_are_refused(tmp_path):
    tensors = write_unet(tmp_path)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].astype(np.int8)
    safetensors.numpy.save_file(tensors, tmp_path / f"{NAME}.safetensors")
    with pytest.raises(UserError, match="conv_in.weight is stored as I8; weights must be F32"):
        deepfloyd.read_unet(tmp_path)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name must be 'UNet2DConditionModel'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type must be"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types must be of"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm must be 'group_norm'"),
        ({"class_embed_type": "projection"}, "class_embed_type must be None .* or 'timestep'"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type must be 'positional'"),
        ({"a_new_field": 3}, "a_new_field must be None or False .*, got 3"),
        ({"attention_head_dim": [4, 8]}, "attention_head_dim must be one positive integer"),
        ({"attention_head_dim": 5}, "head_width=5"),
        ({"layers_per_block": [1]}, "layers_per_block must have 2 values"),
        ({"encoder_hid_dim": None}, "encoder_hid_dim must be one positive integer"),
        ({"act_fn": "mish"}, "act_fn must be gelu or silu"),
    ],
)
def test_another_models_config_is_refused_by_file_and_field(tmp_path, changes, message):
    write_unet(tmp_path, **changes)
    with pytest.raises(UserError, match=rf"{tmp_path}/config.json: .*{message}"):
        deepfloyd.read_unet(tmp_path)


def test_what_config_json_leaves_out_has_the_references_default():
    full = UNETS["stage1"]["config"]
    older = {k: v for k, v in full.items() if k != "encoder_hid_dim_type"}
    assert deepfloyd.unet_config(older) == deepfloyd.unet_config(full)
    config = deepfloyd.unet_config({k: v for k, v in full.items() if k != "layers_per_block"})
    assert [level.blocks for level in config.levels] == [2, 2]
    with pytest.raises(ValueError, match="mid_block_type must be"):
        deepfloyd.unet_config({})


def test_hybrid_attention_goes_by_level():
    fields = UNETS["stage2"]["config"] | {
        "down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2,
        "only_cross_attention": [True, False],
    }
    config = deepfloyd.unet_config(fields)
    assert [level.attention for level in config.levels] == ["text", "text and image"]
    assert config.middle_attention == "text and image"
    config = deepfloyd.unet_config(fields | {"mid_block_only_cross_attention": True})
    assert config.middle_attention == "text"


def test_remat_wraps_every_block_and_changes_no_parameter(stage1):
    _, config, params = stage1
    again = dataclasses.replace(config, remat="nothing_saveable")
    abstract = Network(again, again.widths).abstract()
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, params)
    # Down 1 + 1 + 1, middle 2, up 2 + 1 + 2 residual blocks; 1 + 1 + 2 attentions.
    for c, blocks in ((config, 0), (again, 10 + 4)):
        jaxpr = jax.make_jaxpr(Network(c, c.widths).__call__)(params, *inputs("stage1"))
        assert sum(e.primitive.name in ("checkpoint", "remat2") for e in jaxpr.eqns) == blocks


def test_a_written_file_reads_back_tensor_by_tensor(tmp_path):
    tensors = {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones(5, np.float32)}
    weights.write(
        tmp_path / "model.safetensors",
        [("a.b", (2, 3), "BF16"), ("c", (5,), "F32")],
        tensors.__getitem__,
    )
    target = {"a": {"b": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, "c": jnp.ones(5)}
    target = weights.as_target(target, lambda leaf: leaf.dtype)
    with weights.opened(tmp_path, "model", what="x", convert="y") as opened:
        assert opened.dtype("a.b") == "BF16"
        found = weights.read(opened, weights.own_origins(target), target)
    np.testing.assert_array_equal(found["a"]["b"], tensors["a.b"])
    np.testing.assert_array_equal(found["c"], tensors["c"])


PICTURES = np.load(FIXTURES / "deepfloyd" / "pictures.npz")
INPUTS = np.load(FIXTURES / "deepfloyd" / "inputs.npz")


@pytest.mark.parametrize(
    "number, scheduler, roundings", [(1, "DDPM", 1), (2, "DDPM", 1), (1, "DDIM", 2)]
)
def test_a_stage_draws_what_the_pipeline_draws(number, scheduler, roundings, tmp_path, monkeypatch):
    """As close to what the reference computes in float64 as so many times its own float32 is."""
    file = "scheduler/scheduler_config.json"
    folder = write_pipeline(tmp_path, number, [(file, "_class_name", f"{scheduler}Scheduler")])
    stage = Stage(stage_config(folder))
    params = {"network": deepfloyd.read_unet(folder / "unet")[1]}
    settings, steps = stage.config.sampling, {1: 12, 2: 10}[number]
    name = f"stage{number}" + "_ddim" * (scheduler == "DDIM")
    exact, theirs = PICTURES[f"{name}_exact"], PICTURES[name]
    drawn = [noise(k, (1, *exact.shape)) for k in range(steps + 2)]
    text, negative = (
        TextInput(jnp.asarray(INPUTS[k]), jnp.ones(INPUTS[k].shape[:2], bool))
        for k in ("text", "negative")
    )
    values, first = {"text": text}, 1
    if number == 2:
        level = jnp.array([settings.aug_level])
        low, first = jnp.asarray(INPUTS["low"]), 2
        values["lowres"] = stage.config.lowres._augmented(
            low, level, lambda shape: jnp.asarray(drawn[1]), exact.shape[:2]
        )
        told = stage.conditions["lowres"]({}, *values["lowres"])
        assert told.vectors[0].tolist() == [[250]]

    @jax.jit
    def step(params, x, logsnr_t, logsnr_s, last, drawn):
        monkeypatch.setattr(samplers, "_normal", lambda keys, shape: drawn)
        denoiser = stage.denoiser(
            params,
            values,
            guidance=jnp.float32(settings.guidance),
            threshold=settings.threshold,
            negative={"text": negative},
        )
        keys = jax.random.split(jax.random.key(0), 1)
        leg = samplers.Leg(logsnr_t[None], logsnr_s[None], last, keys)
        x_s, x0_hat, _ = settings.sampler(denoiser, x, leg, ())
        return jnp.where(last, x0_hat, x_s)

    schedule = stage.config.schedule
    logsnr = schedule.logsnr(settings.grid(steps, schedule))
    x = jnp.asarray(drawn[0])
    for i in range(steps):
        x = step(params, x, logsnr[i], logsnr[i + 1], i == steps - 1, drawn[first + i])
    error, rounding = (np.abs(picture - exact).max() for picture in (x[0], theirs))
    assert error < roundings * rounding < 1e-2 < 0.5 < np.abs(exact).max()


def test_a_pipeline_is_sampled_as_it_is_and_converted_alike(tmp_path):
    published = write_pipeline(tmp_path / "IF-I", 1)
    report = convert.convert_deepfloyd(
        convert.DeepFloydOptions(out=tmp_path / "model", stage1=str(published))
    )
    assert report["stages"] == ["if8"] and (report["max_tokens"], report["captions"]) == (
        77,
        "clean",
    )
    drawn = []
    for name in (tmp_path / "model", published):
        cascade = Cascade.load(name)
        assert (cascade.encoder.max_tokens, cascade.encoder.tokenizer.captions) == (77, "clean")
        drawn.append(cascade("A Red  circle", steps=2)[0].image)
    assert drawn[0].shape == (8, 8, 3) and drawn[0].std() > 10
    np.testing.assert_array_equal(*drawn)
    with pytest.raises(UserError, match="exists already"):
        convert.convert_deepfloyd(
            convert.DeepFloydOptions(out=tmp_path / "model", stage1=str(published))
        )


def test_two_pipelines_meet_and_hold_the_published_settings(tmp_path):
    write_pipeline(tmp_path / "I", 1), write_pipeline(tmp_path / "II", 2)
    one, two = (p.config for p in pipelines([tmp_path / "I", tmp_path / "II"]))
    assert (one.resolution, one.lowres_resolution) == (8, None)
    assert (two.resolution, two.lowres_resolution) == (16, 8)
    assert (one.sampling.steps, one.sampling.guidance) == (100, 7.0)
    assert (two.sampling.steps, two.sampling.guidance) == (50, 4.0)
    assert [s.sampling.threshold.cap for s in (one, two)] == [1.5, 1.0]
    assert one.sampling.sampler == samplers.Ancestral(gamma="learned")
    one.check(dataclasses.replace(one.sampling, sampler=samplers.DDIM()))  # it may be hurried
    times = one.sampling.grid(100, one.schedule)
    assert np.asarray(one.schedule.entry(one.schedule.logsnr(times[:-1]))).tolist() == list(
        range(990, -1, -10)
    )


def test_guidance_below_1_which_is_none_in_diffusers_is_refused(tmp_path):
    (config,) = (p.config for p in pipelines([write_pipeline(tmp_path, 1)]))
    for weight in (0, 0.5):
        with pytest.raises(OptionError, match=rf"must be 1, .* in if8: .*; got {float(weight)}"):
            override([config], guidance=weight)
    assert override([config], guidance=1)[0].guided is False


@pytest.mark.parametrize(
    "file,field,value",
    [
        ("model_index.json", "_class_name", "StableDiffusionPipeline"),
        ("scheduler/scheduler_config.json", "_class_name", "PNDMScheduler"),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid"),
        ("scheduler/scheduler_config.json", "variance_type", "learned"),
        ("scheduler/scheduler_config.json", "timestep_spacing", "linspace"),
        ("scheduler/scheduler_config.json", "trained_betas", 0.5),
        ("scheduler/scheduler_config.json", "trained_betas", [0.5]),
        ("unet/config.json", "sample_size", 9),
    ],
)
def test_a_pipeline_that_is_not_if_is_refused_by_file_and_field(tmp_path, file, field, value):
    write_pipeline(tmp_path, 1, [(file, field, value)])
    with pytest.raises(
        UserError, match=rf"^{tmp_path / file}: {field} must be .*{re.escape(str(value))}"
    ):
        Cascade.load(tmp_path)


def test_a_hub_name_gets_advice_about_licence_spelling_or_network(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    response = type("Response", (), {"headers": {}, "request": None})()
    for raised, message in (
        (errors.GatedRepoError("no", response=response), "licence must be accepted.*hf auth login"),
        (errors.RepositoryNotFoundError("no", response=response), "check the spelling.*HF_TOKEN"),
        (ConnectionError("no"), r"cannot be reached \(ConnectionError\)"),
    ):

        def download(name, raised=raised, **options):
            raise raised

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        name = "DeepFloyd/IF-I-XL-v1.0"
        with pytest.raises(UserError, match=rf"{name}: .*{message}.*local folder .*{name} holds"):
            Cascade.load(name)


def test_guidance_without_the_embedding_of_no_text_is_refused(tmp_path):
    stage = Stage(stage_config(write_pipeline(tmp_path, 1)))
    values = {"text": TextInput(jnp.asarray(INPUTS["text"]), jnp.ones((1, 7), bool))}
    with pytest.raises(ValueError, match='guidance needs `negative`, the embedding of ""'):
        stage.denoiser(
            {}, values, guidance=jnp.float32(7), threshold=stage.config.sampling.threshold
        )


def test_every_entry_of_a_table_is_found_by_its_logsnr():
    table = Discrete(betas="cosine", steps=1000)
    logsnr = table.logsnr(jnp.arange(1, 1001) / 1000)
    assert table.entry(logsnr).tolist() == list(range(1000))


def test_enlarging_corner_on_corner_is_linear_and_keeps_the_corners():
    ramp = jnp.arange(3.0)[:, None] * 2 + jnp.arange(4.0)[None] * 5
    large = images.upsample_corners(ramp[None, :, :, None], (9, 13))[0, :, :, 0]
    expected = jnp.linspace(0, 4, 9)[:, None] + jnp.linspace(0, 15, 13)[None]
    np.testing.assert_allclose(large, expected, atol=1e-5)
