"""Numbers that no setting can have are refused where a config is made, or before it is used."""

import contextlib
import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pipelines import T5, write_model, write_pipeline, write_unet, write_upscaler

from cascade import config, ranges, testing
from cascade.errors import MOST_LETTERS, UserError
from cascade.models import AutoencoderConfig, CLIPTextConfig
from cascade.models.t5 import T5Config
from cascade.published.deepfloyd.reader import read_unet_config
from cascade.published.deepfloyd.unet import IFLevel, IFUNetConfig
from cascade.runner.model_folder import ModelFolder, open_model
from cascade.stage import Sampling
from cascade.storage.paths import write_json
from cascade.text import T5Encoder, t5

ROOT = Path(__file__).parent.parent / "configs"
NAMES = sorted(str(f.relative_to(ROOT)) for f in ROOT.rglob("*.py") if f.parent.name != "if")


def floats(value, path=()):
    """The path of every float in a config, through dataclasses and tuples."""
    if isinstance(value, float):
        yield path
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from floats(inner, (*path, i))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from floats(getattr(value, field.name), (*path, field.name))


def with_value(whole, path, value):
    """The config with another value there, whatever its classes say of it."""
    if not path:
        return value
    first, *rest = path
    if isinstance(whole, tuple):
        inner = with_value(whole[first], rest, value)
        return (*whole[:first], inner, *whole[first + 1 :])
    inner = with_value(getattr(whole, first), rest, value)
    return dataclasses.replace(whole, **{first: inner})


def unchecked(whole, path, value):
    """The same, where no class has a say: what `config.check` is for."""
    made = config.to_json(whole)
    node = made
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_float_of_a_config_may_be_nan_or_infinite(name, value):
    job = config.load(str(ROOT / name))
    paths = list(floats(job))
    assert len(paths) > 5
    for path in paths:
        with pytest.raises(ValueError, match="."):
            config.check(with_value(job, path, value), "config")
        with pytest.raises(UserError, match=r"must be a finite number|is none of"):
            config.from_json(type(job), unchecked(job, path, value))


@pytest.mark.parametrize("value", [1e308, -1e308, 10**400])
def test_a_number_out_of_all_proportion_is_refused_or_does_no_harm(value):
    """Of a schedule it would overflow in the first step."""
    job = config.load(str(ROOT / "tiny" / "base64.py"))
    for path in floats(job):
        if "schedule" in path or "sampling" in path or "loss" in path:
            with pytest.raises(ValueError, match="must be|None or"):
                config.from_json(type(job), unchecked(job, path, value))


@pytest.mark.parametrize(
    "field,value",
    [
        *(("num_layers", v) for v in (10_000_000, 0, -1, True, 10**400)),
        *(("d_model", v) for v in (0, 10**12)),
        *(("n_positions", v) for v in (0, -1, 10**12)),
        *(("num_heads", v) for v in (0, -4, 10**9)),
        *(("vocab_size", v) for v in (0, 10**12)),
        *(("layer_norm_epsilon", v) for v in (-1.0, math.nan, math.inf)),
        *(("relative_attention_max_distance", v) for v in (0, 16, 10**12)),
        *(("relative_attention_num_buckets", v) for v in (0, 6, 10**12)),
        *(("pad_token_id", v) for v in (-1, 10**9)),
    ],
)
def test_each_number_of_a_t5_has_a_range(tmp_path, field, value):
    told = T5Config(vocab_size=320, d_model=16, d_ff=24, num_layers=3, num_heads=4).to_hf_dict()
    write_json(tmp_path / "config.json", told)
    assert t5.read_config(tmp_path).d_model == 16
    write_json(tmp_path / "config.json", told | {field: value})
    with pytest.raises(UserError, match=rf"config.json: .*{field}") as e:
        t5.read_config(tmp_path)
    assert "\n" not in str(e.value)


def test_a_t5_with_numbers_of_another_type_is_refused(tmp_path):
    """A process of its own, in which no call's types are checked, reads them."""
    told = T5Config(vocab_size=320, d_model=16, d_ff=24, num_layers=3, num_heads=4).to_hf_dict()
    cases = [("num_layers", v) for v in (1.5, "3", None, [3], {})]
    cases += [("layer_norm_epsilon", v) for v in (-1, "x")]
    for i, (field, value) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        write_json(tmp_path / str(i) / "config.json", told | {field: value})
    script = "import sys, pathlib; from cascade.text import t5\nfor f in sys.argv[1:]:\n"
    script += "    try: t5.read_config(pathlib.Path(f))\n    except Exception as e: print(repr(e))"
    folders = [str(tmp_path / str(i)) for i in range(len(cases))]
    command = [sys.executable, "-c", script, *folders]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(cases)
    for (field, _), line in zip(cases, lines, strict=True):
        assert line.startswith("UserError(") and f"T5Config.{field} must be" in line


def test_null_leaves_a_number_of_a_t5_open(tmp_path):
    told = T5Config(vocab_size=320, d_model=16, d_ff=24, num_layers=3, num_heads=4).to_hf_dict()
    write_json(tmp_path / "config.json", told | {"pad_token_id": None, "n_positions": None})
    assert t5.read_config(tmp_path).pad_token_id == 0


def test_a_t5_knows_all_the_ids_that_its_tokenizer_gives(tmp_path):
    for file in T5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert T5Encoder.load(tmp_path).width == 16
    encoder = T5Encoder.load(tmp_path)
    config = dataclasses.replace(encoder.config, vocab_size=encoder.tokenizer.size - 1)
    params = encoder.params | {"shared": encoder.params["shared"][: config.vocab_size]}
    t5.write_folder(tmp_path, config, params, encoder.tokenizer.model)
    with pytest.raises(UserError, match="vocab_size of config.json must be at least"):
        T5Encoder.load(tmp_path)


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(CLIPTextConfig) if f.type in ("int", int)]
)
@pytest.mark.parametrize("value", [0, -1, 10**12, True])
def test_each_number_of_a_clip_has_a_range(field, value):
    with pytest.raises(ValueError, match=f"CLIPTextConfig.{field} must be"):
        CLIPTextConfig(**{field: value})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"groups": 0}, "groups must be at least 1"),
        ({"blocks": 10**9}, "blocks must be at most 64"),
        ({"widths": (32,) * 17}, "widths must be at most 16"),
        ({"widths": (32 * 10**6,)}, "none above 16384"),
        ({"scaling": math.nan}, "scaling must be a number"),
        ({"scaling": 0.0}, "scaling must be a number"),
    ],
)
def test_each_number_of_an_autoencoder_has_a_range(changes, message):
    sizes = {"widths": (32,), "blocks": 1, "scaling": 1.0}
    assert AutoencoderConfig(**sizes).factor == 1
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**sizes | changes)


@pytest.mark.parametrize(
    "field,value",
    [
        *(("layers_per_block", v) for v in (0, 10**6, 1.5, [[1]], "x")),
        *(("block_out_channels", v) for v in ([0, 0], 10**12, [1e308, 8], {}, [None, None])),
        *(("resnet_out_scale_factor", v) for v in (0, "x", math.nan, None, 1e308)),
        *(("mid_block_scale_factor", v) for v in (0, [])),
        *(("norm_eps", v) for v in ("x", math.nan, None, -1, [1])),
        *(("norm_num_groups", v) for v in (0, -1, 10**12, [[]])),
        *(("time_embedding_dim", v) for v in (0, 1.5, 10**12)),
        *(("down_block_types", v) for v in ([], [[]], "x", {}, None)),
        *(("only_cross_attention", v) for v in (1, "x", [[]])),
        *(("attention_head_dim", v) for v in (0, math.nan, 10**30)),
    ],
)
def test_a_published_unets_field_is_told_by_its_name(tmp_path, field, value):
    write_unet(tmp_path, **{field: value})
    with pytest.raises(UserError, match=rf"config.json: .*({field}|levels|groups)"):
        read_unet_config(tmp_path)


@pytest.mark.parametrize(
    "field,value",
    [
        *(("num_train_timesteps", v) for v in (0, 10**12, "1000", None, 1.5, True, -3)),
        *(("beta_start", v) for v in ("x", math.nan, None, -1)),
        *(("beta_end", v) for v in (2, [0.1])),
        *(("thresholding", v) for v in ("yes", 1)),
        *(("sample_max_value", v) for v in (math.inf, "x")),
        *(("steps_offset", v) for v in (1.5, "x", -1)),
    ],
)
def test_a_schedulers_field_is_told_by_its_name(tmp_path, field, value):
    name = "scheduler/scheduler_config.json"
    write_pipeline(tmp_path, 1, [(name, field, value)])
    with pytest.raises(
        UserError, match=rf"scheduler_config.json: .*{field.removeprefix('steps_')}"
    ):
        open_model(str(tmp_path))


def test_a_table_of_three_entries_is_told_where_the_steps_are_chosen(tmp_path):
    write_pipeline(tmp_path, 1, [("scheduler/scheduler_config.json", "num_train_timesteps", 3)])
    with pytest.raises(UserError, match=r"steps must be in 1\.\.3"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("value", [0, -8, 10**12, True, 8.0, "8", None, [8]])
def test_the_side_of_a_published_stage_has_a_range(tmp_path, value):
    write_pipeline(tmp_path, 1, [("unet/config.json", "sample_size", value)])
    with pytest.raises(UserError, match="sample_size must be a multiple of"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("file", ["unet", "vae", "scheduler", "low_res_scheduler", "text_encoder"])
def test_a_config_that_is_a_list_is_told_by_its_file(tmp_path, file):
    write_upscaler(tmp_path)
    name = "scheduler_config.json" if "scheduler" in file else "config.json"
    write_json(tmp_path / file / name, [1])
    with pytest.raises(UserError, match=f"{file}/{name}: must hold"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    "about,message",
    [
        ({"stages": ["a"] * 1000}, "stages must list at most 16 names, got 1000"),
        ({"max_tokens": 10**12}, "max_tokens must be at most 4096"),
        ({"text_encoder": 5}, "text_encoder must be a name, got 5"),
        ({"captions": []}, "captions must be one of"),
    ],
)
def test_what_a_model_folder_says_of_itself_has_limits(tmp_path, about, message):
    write_model(tmp_path / "m", *())
    told = {"format": "cascade", "stages": ["a"], **about}
    write_json(tmp_path / "m" / "config.json", told)
    with pytest.raises(UserError, match=message):
        ModelFolder(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "path,value,message",
    [
        (("network", "levels", 0, "blocks"), 10**9, "blocks must be at most 64"),
        (("network", "levels", 0, "width"), 8 * 10**9, "width must be at most 65536"),
        (("network", "patch"), 10**9, "patch must be at most 64"),
        (("network", "emb_width"), 0, "emb_width must be at least 1"),
        (("space", "resolution"), 10**9, "resolution must be at most 16384"),
    ],
)
def test_sizes_of_a_stage_are_bounded_before_anything_is_built(path, value, message):
    stage = testing.base_stage()
    with pytest.raises(UserError, match=message):
        config.from_json(type(stage), unchecked(stage, path, value))


def test_a_config_nested_beyond_reason_is_refused():
    told = {"type": "cascade.diffusion.process.Cosine"}
    for _ in range(5000):
        told = {"type": "cascade.diffusion.process.ZeroTerminal", "schedule": told}
    stage = config.to_json(testing.base_stage()) | {"schedule": told}
    with pytest.raises(UserError, match="nested too deeply"):
        config.from_json(type(testing.base_stage()), stage)


def test_a_message_that_quotes_a_long_value_keeps_its_beginning_and_its_end():
    said = str(UserError(f"field: got {'x' * 10**6}; write less"))
    assert said.startswith("field: got x") and said.endswith("; write less")
    assert len(said) < MOST_LETTERS


@pytest.mark.parametrize("levels", [0, 1, ranges.MOST_LEVELS, ranges.MOST_LEVELS + 1])
def test_a_network_has_a_level_and_not_too_many(levels):
    level = IFLevel(width=32, blocks=1)
    sizes = {"cross_width": 32, "emb_width": 32, "head_width": 32, "text_width": 64}
    fine = 1 <= levels <= ranges.MOST_LEVELS
    with contextlib.nullcontext() if fine else pytest.raises(ValueError, match="levels must hold"):
        IFUNetConfig(levels=(level,) * levels, **sizes)


def test_a_limit_itself_is_allowed():
    assert Sampling(guidance=1e6).guidance == 1e6
    with pytest.raises(ValueError, match=r"Sampling.guidance must be a number, 0 to 1e\+06"):
        Sampling(guidance=1.1e6)
    for value, fine in ((8, True), (9, False)):
        with contextlib.nullcontext() if fine else pytest.raises(ValueError, match="at most 8"):
            ranges.whole(SimpleNamespace(n=value), 1, 8, "n")
    assert ranges.shown(10**400) == "a number of 1329 bits" and ranges.shown(2.5) == "2.5"
