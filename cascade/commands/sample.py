"""`cascade sample`: prompts in, a folder of numbered pictures out."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade import config
from cascade.devices import distributed
from cascade.errors import UserError
from cascade.storage import paths

if TYPE_CHECKING:
    from cascade.runner.cascade import Cascade, Picture
    from cascade.stage import Sampling, Stage, StageConfig

ByStage = Annotated[
    str | None,
    tyro.conf.arg(metavar="LIST", help_behavior_hint="(default: the model's own)"),
]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")]
Until = Annotated[
    int | None, tyro.conf.arg(metavar="SIDE", help_behavior_hint="(default: the last stage's)")
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw pictures from prompts.

    For picture 0000 this writes OUT/0000_64.png, OUT/0000_256.png, OUT/0000_1024.png and
    OUT/0000.json (prompt, seed, every setting, versions, the model's hash), and OUT/grid.png when
    there are several; one line of JSON on stdout for each. A folder that has pictures already is
    continued. Lists such as --steps 16,4,2 go by stage, smallest first; one value is for all.
    Several processes, started as `cascade train --help` says, share the pictures among them.
    """

    prompts_: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="prompt", metavar="PROMPT ...")
    ] = ()
    """What to draw; quote each prompt."""
    prompts: File = None
    """A UTF-8 text file with one prompt a line, drawn after those given as words."""
    model: str = "scenes"
    """A model that ships (scenes), a folder that `cascade export` or `cascade convert` wrote, or
    the folders (or Hugging Face names) of DeepFloyd IF's stages, with a comma between them; the
    third is stable-diffusion-x4-upscaler."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of DeepFloyd IF's and the upscaler's weights, and of all their computation, text
    encoders included."""
    t5_int8: bool = False
    """Keep the text encoder's matrices in int8, with a scale for every 64 inputs of an output: .53
    of bfloat16's memory. An embedding's cosine to the exact one stays above .999, measured on
    random weights of T5-v1.1's sizes."""
    offload: bool = False
    """Keep weights in the host's memory, and on the device only those of the text encoder or the
    stage at work: for models that are larger than the device."""
    out: Path = Path("samples")
    """The folder to write into; made if it is missing. gs:// and s3:// names are understood."""
    seed: int = 0
    """Seed of each prompt's first picture; the next ones count up."""
    num: int = 1
    """Pictures of each prompt."""
    until: Until = None
    """Stop at the stage that draws this side, in pixels (64, 256 or 1024)."""
    lowres: File = None
    """Start from this 64 or 256 px picture: super-resolution only."""
    init_image: File = None
    """Redraw this picture (its central square; any size), as much as --strength says."""
    mask: File = None
    """Which part of --init-image, in a picture of its size: white is drawn anew, black stays."""
    strength: Annotated[str | None, tyro.conf.arg(metavar="LIST", help_behavior_hint="")] = None
    """How much of --init-image changes, by stage: the share of the steps taken, above 0 to 1.
    Default: .7 in the base stage (1 with --mask), .8 in the others."""
    steps: ByStage = None
    """Sampling steps, by stage: a number, or a list of DeepFloyd IF's such as smart50."""
    grid: ByStage = None
    """Spacing of the sampling steps, by stage: uniform, quadratic, logsnr, karras, trailing or
    leading (the last two on a table of 1000)."""
    guidance: ByStage = None
    """Weight of classifier-free guidance, by stage; 1 is none."""
    guidance_plan: ByStage = None
    """The weight over the steps, by stage: constant, interval (at middling noise only) or
    oscillating (in every other step)."""
    rescale: ByStage = None
    """How far guided predictions get back the contrast of unguided ones, 0 to 1, by stage."""
    aug_level: ByStage = None
    """Noise on the low-resolution picture, 0 to 1, by super-resolution stage."""
    sampler: ByStage = None
    """By stage: ancestral, ddim, dpm++, dpm++sde or heun; with a number for the noise they add,
    ancestral:0.3 (gamma), ddim:0.5 (eta) or heun:0.1 (churn)."""
    threshold: ByStage = None
    """By stage: none, static or dynamic (Imagen's), the last also with percentile and cap, as in
    dynamic:0.95:1.5."""
    negative: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """What guidance moves away from, instead of the empty condition."""
    text_encoder: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the model's own)")
    ] = None
    """A T5 v1.1 encoder instead of the model's own: a local folder, or a name such as
    google/t5-v1_1-xl. Its width must be the one the model was trained on."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Pictures drawn together; default 1 on a CPU, 8 elsewhere."""
    split_rows: int = 1
    """Number of this machine's devices that share each super-resolution picture, by its rows of
    pixels: less memory and time for 1024 px."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run starts faster."""


def main(argv: Sequence[str]) -> None:
    options = config.parse(Options, argv, prog="cascade sample")
    prompts = _prompts(options)
    _check_words(options)
    folder = _output_folder(options.out)
    if options.compilation_cache:
        use_compilation_cache()
    with distributed.processes():
        _sample(options, prompts, folder)


def _sample(options: Options, prompts: list[str], folder: paths.Path) -> None:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from PIL import Image

    from cascade.images import grid, load_image, save_png
    from cascade.runner.cascade import Cascade, default_batch_size, numbers

    share = (jax.process_index(), jax.process_count())
    lowres, init, mask = (
        None if file is None else np.asarray(load_image(file))
        for file in (options.lowres, options.init_image, options.mask)
    )
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask).convert("L"))
    cascade = Cascade.load(
        options.model,
        text_encoder=options.text_encoder,
        dtype=options.dtype,
        t5_int8=options.t5_int8,
        offload=options.offload,
    )
    stages = cascade.select(
        until=options.until, lowres=None if lowres is None else lowres.shape[:2]
    )
    every = [s for s, _ in cascade.stages]
    settings = override([s for s, _ in stages], options, every)
    if share[0] == 0:
        _warn(cascade, prompts)
    # All processes count on from what the first one saw before any of them wrote.
    first = _next_number(folder)
    if share[1] > 1:
        first = int(multihost_utils.broadcast_one_to_all(np.int32(first)))
    total = len(prompts) * options.num
    batch_size = options.batch_size or default_batch_size()
    own = numbers(total, batch_size, share)
    side = 0
    with _progress(len(own) * len(stages), shown=share[0] == 0) as progress:
        pictures = cascade.draw(
            prompts,
            seed=options.seed,
            num=options.num,
            until=options.until,
            lowres=lowres,
            init=init,
            mask=mask,
            strength=_strength(options, [s for s, _ in stages], every),
            negative=options.negative,
            settings=settings,
            batch_size=batch_size,
            share=share,
            split_rows=options.split_rows,
            progress=progress,
        )
        for number, picture in zip(own, pictures, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            line = _write(picture, folder, first + number, save_png, options)
            print(json.dumps(line), flush=True)
            side = _nearest(picture, min(256, max(picture.images)))
    if share[1] > 1:
        multihost_utils.sync_global_devices("pictures drawn")
    if total > 1 and share[0] == 0:
        drawn = [folder / f"{first + n:04d}_{side}.png" for n in range(total)]
        save_png(folder / "grid.png", grid([np.asarray(load_image(file)) for file in drawn]))


def use_compilation_cache() -> None:
    """Keep XLA's compiled programs under the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    import os

    import jax

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "cascade" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def override(
    stages: Sequence[Stage], options: Options, every: Sequence[Stage] | None = None
) -> list[Sampling]:
    """The stages' own settings with the command line's lists laid over them.

    stages: those that draw; every: all of the model, whose number a list may have as well.
    Raises UserError naming the flag for a list of the wrong length or a value out of range.
    """
    import dataclasses

    from cascade.diffusion import denoise, grids, samplers

    steps = {
        "ancestral": (samplers.Ancestral, "gamma"),
        "ddim": (samplers.DDIM, "eta"),
        "dpm++": (samplers.DPMSolverPP2M, None),
        "dpm++sde": (samplers.DPMSolverPP2MSDE, None),
        "heun": (samplers.Heun, "churn"),
    }
    plans = {
        "constant": denoise.Constant(),
        "interval": denoise.Interval(),
        "oscillating": denoise.Oscillating(),
    }
    spacings = {
        "uniform": grids.Uniform(),
        "quadratic": grids.Quadratic(),
        "logsnr": grids.EvenLogSNR(),
        "karras": grids.Karras(),
        "trailing": grids.OnTable(),
        "leading": grids.OnTable(spacing="leading"),
    }
    settings = [s.config.sampling for s in stages]

    def lay(
        flag: str,
        text: str | None,
        parse: Callable[[str, Sampling, StageConfig], dict[str, Any]],
        enlarging: bool = False,
    ):
        """parse: word, settings of the stage so far, its config -> the fields to replace.
        enlarging: the list goes by super-resolution stages."""
        if text is None:
            return
        for name, word in _by_stage(flag, text, stages, every or stages, enlarging).items():
            i = next(i for i, s in enumerate(stages) if s.config.name == name)
            stage = stages[i].config
            try:
                settings[i] = dataclasses.replace(settings[i], **parse(word, settings[i], stage))
                stage.check(settings[i])
            except ValueError as e:
                raise UserError(f"{flag} {word}: {e}") from None

    def count(word: str, now: Sampling, _: StageConfig) -> dict[str, Any]:
        if word in grids.SECTIONS:
            name: Any = word
            grid = grids.Respaced(name=name)
            return {"steps": grid.steps, "grid": grid}
        if not word.isdecimal():
            raise ValueError(f"must be a whole number, or one of {', '.join(grids.SECTIONS)}")
        own = not isinstance(now.grid, grids.Respaced)
        return {"steps": int(word), "grid": now.grid if own else grids.OnTable()}

    def sampler(word: str, _: Sampling, stage: StageConfig) -> dict[str, Any]:
        if word == "ancestral" and stage.variance is not None:
            return {"sampler": samplers.Ancestral(gamma="learned")}
        name, *numbers = word.split(":")
        step, field = _one_of(steps, name)
        if len(numbers) > (field is not None):
            raise ValueError(f"{name} takes {'one number' if field else 'no number'}")
        return {"sampler": step(**dict(zip((field,), map(_number, numbers), strict=False)))}

    def threshold(word: str, now: Sampling, _: StageConfig) -> dict[str, Any]:
        kind, *numbers = word.split(":")
        if len(numbers) > (2 if kind == "dynamic" else 0):
            raise ValueError("takes no numbers, dynamic at most two: percentile and cap")
        fields = dict(zip(("percentile", "cap"), map(_number, numbers), strict=False))
        kind = _one_of({k: k for k in ("none", "static", "dynamic")}, kind)
        return {"threshold": dataclasses.replace(now.threshold, kind=kind, **fields)}

    lay("--grid", options.grid, lambda w, *_: {"grid": _one_of(spacings, w)})
    lay("--steps", options.steps, count)
    lay("--guidance", options.guidance, lambda w, *_: {"guidance": _number(w)})
    lay(
        "--guidance-plan", options.guidance_plan, lambda w, *_: {"guidance_plan": _one_of(plans, w)}
    )
    lay("--rescale", options.rescale, lambda w, *_: {"guidance_rescale": _number(w)})
    lay("--aug-level", options.aug_level, lambda w, *_: {"aug_level": _number(w)}, True)
    lay("--sampler", options.sampler, sampler)
    lay("--threshold", options.threshold, threshold)
    return settings


def _strength(
    options: Options, stages: Sequence[Stage], every: Sequence[Stage]
) -> list[float] | None:
    """By stage, as `Cascade.draw` takes it."""
    if options.strength is None:
        return None
    words = _by_stage("--strength", options.strength, stages, every)
    try:
        return [_number(word) for word in words.values()]
    except ValueError as e:
        raise UserError(f"--strength {options.strength}: {e}") from None


def _by_stage(
    flag: str,
    text: str,
    stages: Sequence[Stage],
    every: Sequence[Stage],
    enlarging: bool = False,
) -> dict[str, str]:
    """A list's word for each of the stages that draw, or for those of them that enlarge."""

    def names(of: Sequence[Stage]) -> list[str]:
        return [s.config.name for s in of if not enlarging or s.config.lowres_resolution]

    drawn, known = names(stages), names(every)
    words = [word.strip() for word in text.split(",")]
    if not drawn:
        raise UserError(f"{flag} {text}: no super-resolution stage draws; leave it out")
    if "" in words:
        raise UserError(f"{flag} {text!r}: value {words.index('') + 1} is empty")
    if len(words) == 1:
        words *= len(drawn)
    elif len(words) == len(known):
        words = [word for word, name in zip(words, known, strict=True) if name in drawn]
    if len(words) != len(drawn):
        count = "1 stage" if len(drawn) == 1 else f"{len(drawn)} stages"
        raise UserError(
            f"{flag} {text}: {len(words)} values for {count} ({', '.join(drawn)}); give one for "
            "each, or a single one for all"
        )
    return dict(zip(drawn, words, strict=True))


def _number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a number, such as 0.5, got {word!r}")
    return value


def _one_of(values: Mapping[str, Any], word: str) -> Any:
    if word not in values:
        raise ValueError(f"must be one of {', '.join(values)}")
    return values[word]


def _prompts(options: Options) -> list[str]:
    prompts = [(p, f"prompt {i + 1}") for i, p in enumerate(options.prompts_)]
    if options.prompts is not None:
        path = options.prompts
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as e:
            raise UserError(
                f"--prompts {path}: not UTF-8 text (byte {e.start}); save it as UTF-8"
            ) from None
        except OSError as e:
            raise UserError(
                f"--prompts {path}: {e.strerror}; give a text file, one prompt a line"
            ) from None
        while lines and not lines[-1].strip():
            lines.pop()
        prompts += [
            (line.strip(), f"--prompts {path}, line {i + 1}") for i, line in enumerate(lines)
        ]
    if not prompts:
        raise UserError('nothing to draw: give a prompt, as in cascade sample "a red circle"')
    for prompt, where in prompts:
        if not prompt.strip():
            raise UserError(f"{where} is empty; write what to draw, or remove it")
    return [prompt for prompt, _ in prompts]


def _check_words(options: Options) -> None:
    if options.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {options.seed}")
    if options.seed + options.num > 2**32:
        raise UserError(
            f"--seed {options.seed} and --num {options.num}: their sum must be at most 2^32"
        )
    counts = {"--num": options.num, "--batch-size": options.batch_size}
    for flag, value in {**counts, "--split-rows": options.split_rows}.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} must be 1 or more, got {value}")
    for flag, value in (("--mask", options.mask), ("--strength", options.strength)):
        if value is not None and options.init_image is None:
            raise UserError(f"{flag} {value}: goes with --init-image, which is missing")


def _output_folder(name: Path) -> paths.Path:
    out = paths.path(name)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if not isinstance(out, Path):
        return out
    parent = next(p for p in [out, *out.absolute().parents] if p.exists())
    import os

    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out}: cannot be written there")
    return out


def _next_number(folder: paths.Path) -> int:
    """One past the largest picture number in a folder; 0 in a new one."""
    if not folder.is_dir():
        return 0
    found = (re.match(r"(\d{4,})(_\d+\.png|\.json)$", p.name) for p in folder.iterdir())
    return max((int(m[1]) for m in found if m), default=-1) + 1


def _write(
    picture: Picture,
    folder: paths.Path,
    number: int,
    save_png: Callable[..., None],
    options: Options,
) -> dict[str, Any]:
    name = f"{number:04d}"
    if (folder / f"{name}.json").exists():
        raise UserError(
            f"--out {folder}: picture {name} has come there since this command started; give every "
            "command that draws at the same time a folder of its own"
        )
    names = ("cascade-diffusion", "jax", "jaxlib", "flax")
    fields = ("text_encoder", "dtype", "t5_int8", "lowres", "init_image", "mask")
    given = {field: getattr(options, field) for field in fields}
    record = {
        **picture.metadata,
        **{field: str(v) if isinstance(v, Path) else v for field, v in given.items()},
        "versions": {n: version(n) for n in names},
    }
    files = {}
    for side, image in picture.images.items():
        files[str(side)] = str(folder / f"{name}_{side}.png")
        save_png(files[str(side)], image, {"prompt": picture.prompt, "seed": str(picture.seed)})
    with paths.writing(folder / f"{name}.json") as file:
        file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"picture": name, "prompt": picture.prompt, "seed": picture.seed, "files": files}


def _warn(cascade: Cascade, prompts: Sequence[str]) -> None:
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        print(
            f"warning: {len(prompts)} prompts of one word each; a prompt of several words needs "
            f'quotes: "{" ".join(prompts[:5])}"',
            file=sys.stderr,
        )
    encoders = [cascade.encoder, *cascade.own_encoders.values()]
    cuts = [encoder.tokenize(list(prompts)).truncated for encoder in encoders]
    for i, prompt in enumerate(prompts):
        short = prompt if len(prompt) <= 40 else prompt[:37] + "..."
        cutting = [e for e, cut in zip(encoders, cuts, strict=True) if cut is not None and cut[i]]
        if cutting:
            print(
                f"warning: prompt {short!r} is longer than {cutting[0].max_tokens} tokens; "
                "what comes after them is not seen",
                file=sys.stderr,
            )
        if unknown := cascade.unknown_words(prompt):
            listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            print(
                f"warning: not in the captions that {cascade.name} was trained on: {listed}",
                file=sys.stderr,
            )


class _progress:
    """A bar over (stage, picture) pairs, on stderr."""

    def __init__(self, total: int, shown: bool):
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, unit="stage", desc="drawing", dynamic_ncols=True, disable=not shown
        )

    def __enter__(self) -> Callable[[str, int], None]:
        def advance(stage: str, pictures: int) -> None:
            self._bar.set_postfix_str(f"{stage} done")
            self._bar.update(min(pictures, self._bar.total - self._bar.n))

        return advance

    def __exit__(self, *error: Any) -> Literal[False]:
        self._bar.close()
        return False


def _nearest(picture: Picture, side: int) -> int:
    return min(picture.images, key=lambda s: abs(s - side))
