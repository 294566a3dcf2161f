import jax
import pytest

from cascade import bench, testing
from cascade.bench import TrainOptions
from cascade.errors import UserError
from cascade.stage import Stage

CONFIG = """
from cascade import testing, train

def config():
    return train.TrainConfig(stage=testing.super_resolution_stage(), images=8, batch_size=8)
"""


def test_training_speed_is_measured_on_any_config(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    got = bench.bench_train(TrainOptions(config=file, batch_size=16, steps=2, tokens=4))
    assert got["images_per_second"] == pytest.approx(16 / got["step_seconds"], rel=0.1)
    abstract = Stage(testing.super_resolution_stage()).abstract()
    assert got["parameters"] == sum(x.size for x in jax.tree.leaves(abstract))
    assert got["tflops_per_device"] > 0 and got["mfu"] is None and got["devices"] == 8
    with pytest.raises(UserError, match="must be a multiple of the 8 parts"):
        bench.bench_train(TrainOptions(config=file, batch_size=4))
