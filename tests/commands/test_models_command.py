"""`cascade models`: what it says of the model that ships, and of folders."""

import json

import jax
import pytest
from model_folders import model_folder

from cascade import cli, testing
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model, shipped


def told(capsys, *words):
    cli.main(["models", *map(str, words)])
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_it_tells_of_what_ships(capsys):
    every, table = told(capsys)
    assert [one["model"] for one in every] == shipped()
    (about,) = [one for one in every if one["model"] == "scenes"]
    assert [(s["from"], s["draws"]) for s in about["stages"]] == [
        (None, 64),
        (64, 256),
        (256, 1024),
    ]
    for stage in about["stages"]:  # the parameters are those that are read
        config = next(s for s in open_model("scenes").stages if s.name == stage["stage"])
        leaves = jax.tree.leaves(open_model("scenes").read(config))
        assert stage["parameters"] == sum(leaf.size for leaf in leaves)
        assert f"{stage['parameters'] / 1e6:.1f} M parameters" in table
    assert about["model_sha256"] == Cascade.load("scenes").digest
    assert "of 72 words alone" in table and "the folder says nothing" in table


@pytest.mark.parametrize(
    "name,text,licence",
    [
        ("README.md", "---\nlicense: apache-2.0\n---\n# Mine\n", "apache-2.0"),
        ("LICENSE", "The Free Licence\n\nDo.\n", "The Free Licence"),
        ("NOTES", "license: x\n", None),
    ],
)
def test_it_tells_what_the_folder_says_of_its_licence(tmp_path, capsys, name, text, licence):
    folder = model_folder(tmp_path / "mine", testing.base_stage())
    (folder / name).write_text(text)
    (about,), _ = told(capsys, folder)
    assert about["licence"] == licence
    assert [stage["stage"] for stage in about["stages"]] == ["base8"]


def test_a_model_that_reads_no_text_has_no_encoder(tmp_path, capsys):
    folder = model_folder(tmp_path / "mine", testing.super_resolution_stage(8, text_width=0))
    (about,), table = told(capsys, folder)
    assert about["text_encoder"] is about["captions"] is about["max_tokens"] is None
    assert "  reads no text\n" in table
