"""Pipelines of diffusers by name: a folder here, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from cascade.errors import UserError
from cascade.storage import hub

_WANTED = [
    *("model_index.json", "*/config.json", "*/scheduler_config.json", "tokenizer/*"),
    *("unet/*fp16*", "vae/*fp16*", "text_encoder/*fp16*"),
]
"""The files of a repository that are downloaded, but for pickles (.bin)."""


def locate(name: str | Path) -> Path:
    """Find the folder of a pipeline: this one, or a download of what the hub has under this name.

    The name may end with @REVISION. Raises UserError with what to do about a missing folder,
    network, licence or token.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"model {name}: holds no model_index.json; give the folder of a diffusers pipeline"
            )
        return folder
    if isinstance(name, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+" + hub.REVISION, str(name)):
        raise UserError(f"model {name}: no such folder")
    return _downloaded(str(name))


def _downloaded(name: str) -> Path:
    from huggingface_hub import errors

    address = f"https://huggingface.co/{name.partition('@')[0]}"
    wanted = (
        f"a local folder with what {address} holds (model_index.json, unet/, "
        "scheduler/; text_encoder/ and tokenizer/ in stage I)"
    )
    try:
        return hub.download(name, _WANTED)
    except errors.GatedRepoError:
        raise UserError(
            f"model {name}: its licence must be accepted first: log in at "
            f"{address}, accept it, make a token and run `hf auth login` (or "
            f"set HF_TOKEN); or give {wanted}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"model {name}: the Hugging Face hub has none of this name, or hides it from those "
            "without its licence: check the spelling, run `hf auth login` (or set HF_TOKEN); or "
            f"give {wanted}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"model {name}: the repository has no revision {name.partition('@')[2]!r}; give a "
            f"branch, tag or commit that {address}/commits lists, or none for the newest; or give "
            f"{wanted}"
        ) from None
    except Exception as e:  # the client lets several libraries' network errors through
        raise UserError(
            f"model {name}: no folder of this name here, and the Hugging Face hub cannot be "
            f"reached ({type(e).__name__}); give {wanted}"
        ) from None
