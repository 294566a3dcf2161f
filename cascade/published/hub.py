"""What is published by name: a folder here, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import UserError
from cascade.storage import hub

_PIPELINE = [
    *("model_index.json", "*/config.json", "*/scheduler_config.json", "tokenizer/*"),
    *("unet/*fp16*", "vae/*fp16*", "text_encoder/*fp16*"),
]
"""The files of a pipeline that are downloaded, but for pickles (.bin)."""


def locate(name: str | Path) -> Path:
    """Find the folder of a pipeline: this one, or a download of what the hub has under this name.

    The name may end with @REVISION. Raises UserError with what to do about a missing folder,
    network, licence or token.
    """
    return find(
        name,
        what="model",
        begins="model_index.json",
        kind="a diffusers pipeline",
        holds="model_index.json, unet/, scheduler/; text_encoder/ and tokenizer/ in stage I",
        wanted=_PIPELINE,
    )


def find(
    name: str | Path, *, what: str, begins: str, kind: str, holds: str, wanted: Sequence[str]
) -> Path:
    """Find a folder here, or download it, as `locate` does.

    what: how errors call it. begins: a file that it must have. kind: what it is the folder of.
    holds: its files, in words. wanted: patterns of the files that are downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / begins).is_file():
            raise UserError(f"{what} {name}: holds no {begins}; give the folder of {kind}")
        return folder
    if isinstance(name, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+" + hub.REVISION, str(name)):
        raise UserError(f"{what} {name}: no such folder")
    return _downloaded(str(name), what, holds, wanted)


def _downloaded(name: str, what: str, holds: str, files: Sequence[str]) -> Path:
    from huggingface_hub import errors

    address = f"https://huggingface.co/{name.partition('@')[0]}"
    wanted = f"a local folder with what {address} holds ({holds})"
    try:
        return hub.download(name, files)
    except errors.GatedRepoError:
        raise UserError(
            f"{what} {name}: its licence must be accepted first: log in at "
            f"{address}, accept it, make a token and run `hf auth login` (or "
            f"set HF_TOKEN); or give {wanted}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{what} {name}: the Hugging Face hub has none of this name, or hides it from those "
            "without its licence: check the spelling, run `hf auth login` (or set HF_TOKEN); or "
            f"give {wanted}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{what} {name}: the repository has no revision {name.partition('@')[2]!r}; give a "
            f"branch, tag or commit that {address}/commits lists, or none for the newest; or give "
            f"{wanted}"
        ) from None
    except Exception as e:  # the client lets several libraries' network errors through
        raise UserError(
            f"{what} {name}: no folder of this name here, and the Hugging Face hub cannot be "
            f"reached ({type(e).__name__}); give {wanted}"
        ) from None
