"""Model folders, as `cascade export` lays them out, of weights that are random."""

import shutil

from cascade import testing
from cascade.config import to_json
from cascade.runner.model_folder import SHIPPED
from cascade.stage import Stage
from cascade.storage.paths import write_json
from cascade.storage.weights import save_safetensors


def model_folder(folder, *stages, **about):
    """A folder of these stages and the text encoder that ships. about: what config.json says."""
    for stage in stages:
        (folder / stage.name).mkdir(parents=True)
        write_json(folder / stage.name / "config.json", to_json(stage))
        save_safetensors(folder / stage.name / "model.safetensors", testing.lively(Stage(stage)))
    shutil.copytree(SHIPPED / "scenes/text_encoder", folder / "text_encoder")
    said = {"format": "cascade", "version": 2, "stages": [stage.name for stage in stages], **about}
    write_json(folder / "config.json", said)
    return folder
