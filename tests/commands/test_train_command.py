"""What the words of `cascade train` make of a config file."""

from pathlib import Path

import pytest

from cascade.commands import train
from cascade.commands.train import read_job
from cascade.errors import UserError
from cascade.training.trainable import LoRA, Weights

CONFIG = "configs/scenes/base64.py"


def job_of(*words):
    return read_job(CONFIG, words, prog="cascade train")


def test_a_rank_makes_adapters_of_any_configs_weights():
    job = job_of("--lora-rank", "2", "--init", "scenes", "--trainable.rank", "3")
    assert job.trainable == LoRA(rank=3) and job.init == "scenes"
    assert job_of("--init", "scenes", "--lora-rank", "0").trainable == Weights()
    assert job_of().trainable == Weights()


@pytest.mark.parametrize(
    "words,told",
    [
        (("--lora-rank", "2"), "--lora-rank 2: StageTraining.trainable must be Weights"),
        (("--lora-rank", "two"), "--lora-rank must be a whole number"),
        (("--lora-rank", "-1"), "--lora-rank must be a whole number"),
        (("--lora-rank",), "--lora-rank needs a value"),
    ],
)
def test_ranks_that_cannot_be_are_told(words, told):
    with pytest.raises(UserError, match=told):
        job_of(*words)


def test_an_option_is_given_once():
    with pytest.raises(UserError, match=r"--until is given 2 times \(8, 16\); give it once"):
        train.main([CONFIG, "--workdir", "w", "--until", "8", "--until=16"])


@pytest.mark.parametrize("until", ["0", "-1", "many"])
def test_a_run_of_no_images_is_refused(until, tmp_path):
    with pytest.raises(UserError, match="--until must be a number of images, 1 or more, got"):
        train.main([CONFIG, "--workdir", str(tmp_path / "w"), "--until", until])
    assert not (tmp_path / "w").exists()


def test_help_of_a_config_that_lacks_an_argument_says_what_it_is_and_needs(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text('"""Mine: twice the size."""\ndef config(init, rest): 1 / 0\n')
    with pytest.raises(SystemExit) as e:
        train.main([str(file), "--rest", "models/if", "--help"])
    assert not e.value.code
    told = capsys.readouterr().out
    assert told.startswith("Mine: twice the size.\n") and f"{file} needs --init:" in told


@pytest.mark.parametrize(
    "words,more",
    [
        (("--until", "8"), ", up to --until 8 of 32 images; without --until it goes on"),
        (("--until", "32"), ""),
        ((), ""),
    ],
)
def test_a_run_says_whether_it_came_to_its_own_end(words, more, monkeypatch, tmp_path, capsys):
    file = tmp_path / "line.py"
    file.write_text(
        "from test_job import Line\ndef config(): return Line(images=32, batch_size=8)\n"
    )
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training")
    monkeypatch.setattr("cascade.training.loop.fit", lambda *a, **k: True)
    train.main([str(file), "--workdir", str(tmp_path / "w"), *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"done: {tmp_path / 'w'}{more}"
