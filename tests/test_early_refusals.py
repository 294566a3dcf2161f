"""What cannot be is told before anything is trained, drawn or written."""

import dataclasses

import pytest

from cascade import config, testing
from cascade.data import FolderData
from cascade.errors import UserError
from cascade.published import earlier_versions
from cascade.runner.cascade import check_chain
from cascade.training.loop import fit
from cascade.training.trainable import Only


@pytest.mark.parametrize("name", ["my stage", "", "a/b", "..", "text_encoder"])
def test_a_stage_is_named_as_its_folder_can_be(name):
    with pytest.raises(ValueError, match="StageConfig.name must be of letters"):
        dataclasses.replace(testing.base_stage(), name=name)


def test_two_stages_of_a_cascade_have_two_names():
    base, above = testing.base_stage(), testing.super_resolution_stage()
    check_chain([base, above])
    with pytest.raises(UserError, match="two stages are named base8"):
        check_chain([base, dataclasses.replace(above, name="base8")])


@pytest.mark.parametrize("value", [{"type": "StageConfig"}, {"type": "TextPretraining"}])
def test_a_damaged_config_of_an_earlier_version_is_told(value):
    with pytest.raises(UserError, match="a config of an earlier version is damaged"):
        earlier_versions.upgraded(value)


@pytest.mark.parametrize("text", ["def", "raise RuntimeError('no')", "import nothing_of_this_name"])
def test_a_trusted_module_that_fails_is_told_in_a_line(tmp_path, monkeypatch, text):
    (tmp_path / "failing_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="--trust failing_module: "):
        config.trust("failing_module")


def test_a_class_of_the_config_file_is_refused_before_training(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "import dataclasses\n"
        "from cascade.data import Data\n"
        "from cascade import testing\n"
        "from cascade.training.stage_training import StageTraining\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Data): pass\n"
        "def config():\n"
        "    stage = testing.base_stage()\n"
        "    return StageTraining(stage=stage, data=Mine(), images=8, batch_size=8)\n"
    )
    with pytest.raises(UserError, match="Mine is a class of the config file"):
        fit(config.load(str(file)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_trains_nothing_is_refused_before_the_folder_is_made(tmp_path):
    job = dataclasses.replace(
        config.load("configs/tiny/base64.py"), trainable=Only(pattern="netwrok/"), init="scenes"
    )
    with pytest.raises(UserError, match="'netwrok/' is found in no parameter's path"):
        fit(job, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_dataset_is_told_before_the_text_encoder_is_looked_for(tmp_path):
    job = dataclasses.replace(
        config.load("configs/tiny/base64.py"),
        data=FolderData(path=str(tmp_path / "none")),
        text_encoder=str(tmp_path / "no_encoder"),
    )
    with pytest.raises(UserError, match="data folder .*none"):
        fit(job, tmp_path / "run")
