import dataclasses
import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import tyro

from cascade import cli, config, testing
from cascade.data import (
    degradation,
    filters,
    folder,
    hf,
    mixture,
    pictures,
    samples,
    source,
    table,
    tar,
    tfds,
)
from cascade.diffusion import denoise, grids, loss, process, samplers
from cascade.errors import UserError
from cascade.models import (
    AutoencoderConfig,
    CLIPConfig,
    CLIPTextConfig,
    EfficientLevel,
    EfficientUNetConfig,
    Level,
    NetworkConfig,
    UNetConfig,
)
from cascade.models.blocks import LevelsConfig
from cascade.models.t5 import T5Config
from cascade.published.deepfloyd.unet import IFLevel, IFUNetConfig
from cascade.published.schedulers import Respaced
from cascade.published.stage import PublishedLowRes, PublishedStageConfig, PublishedText
from cascade.published.x4_upscaler.unet import UpscalerLevel, UpscalerUNetConfig
from cascade.scenes.dataset import ScenesData
from cascade.scenes.text_pretraining import TextPretraining
from cascade.scenes.training import ScenesTraining
from cascade.stage import (
    Augmentation,
    Condition,
    Latents,
    LowRes,
    Pixels,
    Sampling,
    Space,
    StageConfig,
    Text,
)
from cascade.training import job, trainable
from cascade.training.clip_training import CLIPTraining
from cascade.training.stage_training import StageJob, StageTraining
from cascade.training.text_job import TextJob
from cascade.training.text_training import TextTraining


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    kind: ClassVar[str] = "leaf"

    width: int
    wide: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    leaves: tuple[Leaf, ...]
    kind: Literal["a", "b"] = "a"
    part: Leaf | Other
    crop: int | None = None

    def __post_init__(self):
        if not self.leaves:
            raise ValueError("Root.leaves must not be empty")


@dataclass(frozen=True, kw_only=True)
class Copy:
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FROM")]
    """What."""
    out: Path
    """Where to."""
    kind: Literal["a", "b"] = "a"
    """How."""
    times: int | None = None
    """How often."""
    widths: tuple[float, ...] = ()
    """How wide."""


ROOT = Root(leaves=(Leaf(width=3), Leaf(width=4, wide=True)), part=Other(scale=2.0))

LEAF = f"{__name__}.Leaf"


def test_json_round_trip_gives_an_equal_config():
    assert config.from_json(Root, json.loads(json.dumps(config.to_json(ROOT)))) == ROOT


@pytest.mark.parametrize(
    "change,message",
    [
        ({"knd": "a"}, "did you mean 'kind'"),
        ({"kind": "c"}, "config.kind must be one of 'a', 'b'"),
        (
            {"part": {"type": "subprocess.Popen"}},
            "config.part.type must be the qualified name of a Leaf or Other",
        ),
        ({"part": {"width": 3}}, "config.part.type must be the qualified name of a Leaf or Other"),
        ({"leaves": [{"type": LEAF, "width": "3"}]}, "config.leaves[0].width must be int"),
        ({"leaves": [{"type": LEAF, "width": 3, "kind": 4}]}, "Leaf has no field 'kind' (known"),
        ({"part": {"type": LEAF, "width": "3"}}, "config.part.width must be int"),
        ({"leaves": [3]}, "config.leaves[0] must be a Leaf, got 3"),
        ({"leaves": []}, "Root.leaves must not be empty"),
        ({"crop": 1.5}, "config.crop"),
    ],
)
def test_reading_json_names_the_wrong_field(change, message):
    with pytest.raises(UserError) as e:
        config.from_json(Root, config.to_json(ROOT) | change)
    assert message in str(e.value)


def test_command_line_overrides_nested_fields_and_keeps_the_rest():
    got = config.parse(
        Root, ["--leaves.1.width", "9", "--part.scale", "3", "--crop", "8"], default=ROOT, prog="x"
    )
    assert got.leaves == (Leaf(width=3), Leaf(width=9, wide=True))
    assert (got.part, got.crop, got.kind) == (Other(scale=3.0), 8, "a")


def test_a_mistyped_option_names_the_nearest_in_one_line():
    with pytest.raises(UserError) as e:
        config.parse(Root, ["--leaves.1.widht", "9"], default=ROOT, prog="x")
    assert "widht" in str(e.value) and "--leaves" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "x: FROM and --out PATH are missing; see --help"),
        (["a"], "x: --out PATH is missing; see --help"),
        (["a", "--out"], "x: --out needs a value; see --help"),
        (
            ["a", "b", "--out", "o"],
            "x: more words than it takes: b; words that belong together need quotes; see --help",
        ),
        (["a", "--out", "o", "--nope", "3"], "x: unknown option --nope; see --help"),
        (
            ["a", "--ot", "o", "--nope", "3"],
            "x: --out PATH is missing, and --ot and --nope unknown; see --help",
        ),
        (["a", "--out", "o", "--kind", "c"], "x: --kind must be a or b, got 'c'; see --help"),
    ],
)
def test_words_that_are_missing_or_too_many_are_told_in_a_sentence(words, message):
    with pytest.raises(UserError) as e:
        config.parse(Copy, words, prog="x")
    assert str(e.value) == message


def test_help_tells_of_none_and_of_empty_lists_as_people_do(capsys):
    with pytest.raises(SystemExit):
        config.parse(Copy, ["--help"], prog="x")
    told = capsys.readouterr().out
    assert "--times INT|None" in told and re.search(
        r"--widths .*\s+How wide. \(default: none\)", told
    )


def test_a_value_of_the_wrong_type_is_one_line():
    with pytest.raises(UserError, match="--crop"):
        config.parse(Root, ["--crop", "wide"], default=ROOT, prog="x")


def test_config_files_report_mistakes_with_the_nearest_field(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from cascade.devices.sharding import MeshConfig\ndef config(): return MeshConfig(fsdb=2)\n"
    )
    with pytest.raises(UserError, match="'fsdb'.*'fsdp'"):
        config.load(str(file))
    with pytest.raises(UserError, match="no such file"):
        config.load(str(tmp_path / "missing.py"))
    file.write_text("def config(:\n")
    with pytest.raises(UserError, match="line 1"):
        config.load(str(file))
    file.write_text("x = 0\nx = 1 / x\n")
    with pytest.raises(UserError, match="c.py, line 2: ZeroDivisionError"):
        config.load(str(file))
    file.write_text("def config():\n    return unknown\n")
    with pytest.raises(UserError, match="c.py, line 2: NameError: name 'unknown'"):
        config.load(str(file))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Open:
    """What a field may be typed for any kind of it to fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind(Open):
    width: int = 1


@dataclasses.dataclass(kw_only=True)
class Changeable:
    width: int = 1


class NoDataclass:
    width = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    open: Open
    width: int = 0


def reading(name, **fields):
    return config.from_json(Holder, {"open": {"type": name, **fields}})


def test_a_field_holds_any_subclass_of_its_type():
    held = Holder(open=Kind(width=7))
    json_of = config.to_json(held)
    assert json_of["open"] == {"type": f"{__name__}.Kind", "width": 7}
    assert config.from_json(Holder, json.loads(json.dumps(json_of))) == held


@pytest.mark.parametrize(
    "name",
    [
        *(f"{__name__}.{cls}" for cls in ("Leaf", "Changeable", "NoDataclass", "pytest", "Nobody")),
        "json.JSONDecoder",
        "collections.OrderedDict",
        "cascade.diffusion.process.Cosine",
        "cascade.diffusion.process",
        "cascade.no_such.Thing",
        "Kind",
        ".Kind",
        "",
        None,
        3,
        ["cascade.config.Path"],
    ],
)
def test_a_type_that_is_not_a_frozen_dataclass_of_the_expected_kind_is_refused(name):
    with pytest.raises(UserError, match=r"^config.open.type (must be the qualified|names)"):
        reading(name)


def test_a_type_that_is_not_frozen_is_refused():
    with pytest.raises(UserError, match="config.type must be the qualified name of a Changeable"):
        config.from_json(Changeable, {"type": f"{__name__}.Changeable"})


EVIL = """
import dataclasses
from pathlib import Path
from test_config import Open

Path(__file__).with_suffix(".ran").touch()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind(Open):
    width: int = 2
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that can be imported, notes that it was, and has a class that would fit."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(config, "trusted", [])
    (tmp_path / "evil_kinds.py").write_text(EVIL)
    package = tmp_path / "evil_package"
    (package / "inner").mkdir(parents=True)
    for folder_ in (package, package / "inner"):
        (folder_ / "__init__.py").write_text(EVIL)
    importlib.invalidate_caches()
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("evil_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "module",
    [
        "evil_kinds",
        "evil_package",
        "evil_package.inner",
        "this",  # of the standard library, and prints when it is imported
        "cascade.__main__",
        "cascade.stage.__init__",
        "cascade..evil_kinds",
        "cascade...evil_kinds",
        "cascade./evil_kinds",
        "cascade.%2e%2e",
        "cascade.evil_kinds",
        "cascade.Stage",
        "cascade_evil.stage",
        "xcascade.stage",
        "cascade.stage.stage\n",
        "cascade.pretrained.scenes",
    ],
)
def test_reading_json_imports_nothing_but_modules_of_this_package(module, evil, capsys):
    before = set(sys.modules)
    with pytest.raises(UserError, match="imports no code but cascade's own; if you trust that"):
        reading(f"{module}.Kind")
    assert set(sys.modules) == before
    assert not list(evil.rglob("*.ran")) and capsys.readouterr().out == ""


def test_no_code_of_an_imported_module_runs_for_a_name_that_it_has_not(evil, monkeypatch):
    """Some modules import others when they are asked for an attribute."""
    lazy = ("def __getattr__(name):", "import evil_kinds", "return evil_kinds.Kind")
    (evil / "evil_lazy.py").write_text("\n    ".join(lazy))
    config.trust("evil_lazy")
    with pytest.raises(UserError, match="must be the qualified name of a Open, got 'evil_lazy.K"):
        reading("evil_lazy.Kind")
    assert "evil_kinds" not in sys.modules


def test_a_module_is_named_by_json_once_it_is_trusted(evil):
    with pytest.raises(UserError, match="add --trust evil_kinds"):
        reading("evil_kinds.Kind")
    config.trust("evil_kinds")
    assert reading("evil_kinds.Kind").open.width == 2
    assert (evil / "evil_kinds.ran").exists()
    with pytest.raises(UserError, match="config.open.width must be int"):
        reading("evil_kinds.Kind", width="3")


def test_the_command_line_trusts_modules_that_lie_in_the_current_folder(tmp_path):
    """Each once it is named, and before the verb sees its words."""
    for name in ("mine_one", "mine_two"):
        (tmp_path / f"{name}.py").write_text(f"print('{name} is imported')\n")
    words = ["data", "--trust", "mine_one", "--trust=mine_two", "nonsense"]
    done = subprocess.run(
        [sys.executable, "-m", "cascade", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["mine_one is imported", "mine_two is imported"]
    assert done.returncode == 2 and "trust" not in done.stderr and "nonsense" in done.stderr


def test_a_trusted_module_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["sample", "a", "--trust", "no_such_module_of_mine"])
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and line.startswith("error: --trust no_such_module_of_mine: No module")


def test_command_line_reaches_fields_that_only_the_subclass_has():
    stage = testing.base_stage()
    words = ["--network.levels.1.width", "24", "--space.resolution", "16", "--network.patch", "2"]
    got = config.parse(StageConfig, words, default=stage, prog="x")
    assert [level.width for level in got.network.levels] == [8, 24]
    assert (got.space, got.network.patch) == (Pixels(resolution=16), 2)
    assert got.conditions == stage.conditions and got.schedule == stage.schedule


AUTOENCODER = AutoencoderConfig(widths=(8, 8), blocks=1, groups=4, scaling=0.2)
CLIP = CLIPConfig(text=CLIPTextConfig(vocab_size=1024, eos_token_id=2))
T5 = T5Config(vocab_size=1000, d_model=8, d_ff=8, num_layers=1, num_heads=1)
STAGE = testing.super_resolution_stage()
EXAMPLES = {
    process.Schedule: [
        process.Cosine(shift=-2.5),
        process.InterpolatedCosine(shift_clean=-3.0, shift_noise=0.5),
        process.LinearVP(beta_max=18.0),
        process.Sigmoid(tau=0.7),
        process.Discrete(betas="scaled linear", steps=100),
        process.ZeroTerminal(schedule=process.ZeroTerminal(schedule=process.LinearVP())),
    ],
    samplers.Step: [
        samplers.Ancestral(gamma="learned"),
        samplers.Ancestral(gamma=0.5),
        samplers.DDIM(eta=0.5),
        samplers.DPMSolverPP2M(),
        samplers.DPMSolverPP2MSDE(),
        samplers.Heun(slope="noise", churn_within=(0.5, 7.0)),
    ],
    grids.Grid: [
        grids.Uniform(),
        grids.Quadratic(),
        grids.EvenLogSNR(first=-3.0),
        grids.Karras(rho=5.0),
        grids.OnTable(spacing="leading", offset=1, ends_clean=False),
        grids.Chosen(chosen=(999, 500, 0)),
        Respaced(name="smart50"),
    ],
    denoise.GuidancePlan: [
        denoise.Constant(),
        denoise.Interval(low=0.5),
        denoise.Oscillating(low=2.0),
        denoise.PerStep(factors=(1.0, 0.5)),
    ],
    NetworkConfig: [
        UNetConfig(levels=(Level(width=8, blocks=1, attention=True),), head_width=8, patch=2),
        EfficientUNetConfig(levels=(EfficientLevel(width=8, blocks=1),), remat="dots_saveable"),
        IFUNetConfig(
            levels=(IFLevel(width=32, blocks=1),),
            **{"text_width": 64, "cross_width": 32, "emb_width": 16, "head_width": 8},
        ),
        UpscalerUNetConfig(levels=(UpscalerLevel(width=32, blocks=1),)),
    ],
    Space: [Pixels(resolution=8), Latents(resolution=8, autoencoder=AUTOENCODER)],
    Condition: [
        Text(width=8, context_width=6, null_prompt="none"),
        LowRes(resolution=4, augmentation=Augmentation(schedule=process.LinearVP())),
        PublishedText(width=16),
        PublishedLowRes(resolution=4, augmentation=Augmentation(schedule=process.Discrete())),
    ],
    StageConfig: [
        dataclasses.replace(STAGE, sampling=Sampling(steps=5, aug_level=0.25)),
        dataclasses.replace(
            STAGE,
            network=dataclasses.replace(STAGE.network, out_channels=6),
            variance=loss.LearnedVariance(steps=50),
            loss=loss.Loss(weighting="min_snr"),
        ),
    ],
    source.Data: [
        folder.FolderData(path="pictures"),
        tfds.TFDSData(name="coco", data_dir="data"),
        hf.HFData(path="saved", filters=filters.Filters(least_side=64, columns=("score > 5",))),
        table.TableData(path="list.csv", crop="random", flip=True),
        mixture.Mixture(sources=(tar.TarData(path="{0..9}.tar"), ScenesData()), weights=(1.0, 2.0)),
        tar.TarData(path="{0..9}.tar"),
        samples.SamplesData(path="samples"),
        ScenesData(max_objects=2),
    ],
    degradation.Degradation: [degradation.Blur(share=0.25), degradation.BSR()],
    trainable.Trainable: [
        trainable.Weights(),
        trainable.LoRA(rank=2),
        trainable.Only(pattern="attention/"),
    ],
    job.Job: [
        StageTraining(
            stage=STAGE,
            data=ScenesData(),
            images=8,
            batch_size=8,
            ema_profiles=(0.05, 0.1),
            degradation=degradation.Blur(),
        ),
        ScenesTraining(stage=STAGE, data=ScenesData(), images=8, batch_size=8, minutes=1.5),
        TextPretraining(encoder=T5, images=100_000),
        CLIPTraining(clip=CLIP, data=ScenesData(), images=100, batch_size=8),
        TextTraining(encoder=T5, data=folder.FolderData(path="pictures"), images=100_000),
    ],
}
FAMILIES = {LevelsConfig, StageJob, TextJob, PublishedStageConfig, pictures.PictureData}
"""Themselves no kinds; of the last one tests/published has examples."""


def kinds(cls):
    """All subclasses in this package but those of tasks, of which their own tests see to it."""
    own = [c for c in cls.__subclasses__() if c.__module__.startswith("cascade.")]
    own = [c for c in own if not c.__module__.startswith("cascade.tasks.")]
    return {c for sub in own for c in (sub, *kinds(sub))}


@pytest.mark.parametrize("expected", EXAMPLES, ids=lambda cls: cls.__name__)
def test_every_kind_survives_json_under_its_qualified_name(expected):
    for example in EXAMPLES[expected]:
        written = json.loads(json.dumps(config.to_json(example)))
        assert written["type"] == f"{type(example).__module__}.{type(example).__name__}"
        assert config.from_json(expected, written) == example
    assert kinds(expected) - FAMILIES <= {type(e) for e in EXAMPLES[expected]}


def test_a_process_that_has_imported_none_of_them_reads_them_all():
    """And only for what it finds there: reading is what imports a kind."""
    written = {
        f"{cls.__module__}.{cls.__name__}": config.to_json(EXAMPLES[cls]) for cls in EXAMPLES
    }
    code = """
import importlib, json, sys
from cascade import config

for name, values in json.load(sys.stdin).items():
    module, _, cls = name.rpartition(".")
    expected = getattr(importlib.import_module(module), cls)
    for value in values:
        assert config.to_json(config.from_json(expected, value)) == value, value
    if "cascade.stage.space" in name:
        assert "cascade.published.stage" not in sys.modules
print("cascade.published.stage" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(written), capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
