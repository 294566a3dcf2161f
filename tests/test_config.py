import dataclasses
import json
from typing import Literal

import pytest

from cascade import config
from cascade.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
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


ROOT = Root(leaves=(Leaf(width=3), Leaf(width=4, wide=True)), part=Other(scale=2.0))


def test_json_round_trip_gives_an_equal_config():
    assert config.from_json(Root, json.loads(json.dumps(config.to_json(ROOT)))) == ROOT


@pytest.mark.parametrize(
    "change,message",
    [
        ({"knd": "a"}, "did you mean 'kind'"),
        ({"kind": "c"}, "config.kind must be one of 'a', 'b'"),
        ({"part": {"type": "subprocess.Popen"}}, "config.part.type must be one of Leaf, Other"),
        ({"leaves": [{"type": "Leaf", "width": "3"}]}, "config.leaves[0].width must be int"),
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
