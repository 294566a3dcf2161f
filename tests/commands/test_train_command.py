"""What the words of `cascade train` make of a config file."""

import pytest

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
