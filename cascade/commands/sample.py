"""Draw pictures from prompts."""

from __future__ import annotations

import json
import re
import secrets
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade import config
from cascade.devices import distributed
from cascade.errors import UserError
from cascade.runner import counts, output
from cascade.storage import paths
from cascade.tasks import that_have

if TYPE_CHECKING:
    from cascade.published.clip import CLIP
    from cascade.runner.picture import Picture

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
    OUT/0000.json (prompt, seed, every setting, versions, the model's hash), and a line of JSON on
    stdout; for several pictures it writes OUT/grid.png too, of the first 1024, those of a prompt
    side by side above it. A folder that has
    pictures already is continued. Lists such as --steps 16,4,2 go by stage, smallest first; one
    value is for all. Several processes, started as `cascade train --help` says, share the pictures
    among them.
    """

    prompts_: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(name="prompt", metavar="PROMPT ...", help_behavior_hint=""),
    ] = ()
    """What to draw; quote each prompt."""
    prompts: File = None
    """A UTF-8 text file with one prompt a line, of at most 16 MiB, drawn after those given as
    words. Empty lines are passed over."""
    model: str = "scenes"
    """A model that ships (scenes), a folder that `cascade export` or `cascade convert` wrote, or
    the folders (or Hugging Face names) of DeepFloyd IF's stages with a comma between them, the
    third being stable-diffusion-x4-upscaler. Names may end with @REVISION."""
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
    """The folder to write into, made if it is missing; gs:// and s3:// names are understood."""
    seed: int = 0
    """Seed of each prompt's first picture; the next ones count up."""
    random_seed: bool = False
    """Draw the seed itself at random. It is printed, and stands in the JSON."""
    num: int = 1
    """Pictures of each prompt; one command draws at most a million in all."""
    until: Until = None
    """Stop at the stage that draws this side, in pixels (64, 256 or 1024)."""
    size: Annotated[
        str | None, tyro.conf.arg(metavar="HxW", help_behavior_hint="(default: its square)")
    ] = None
    """Height and width in pixels of the first stage's pictures, as in 64x96, where its network
    allows; the others enlarge them alike. What it has learned is the square."""
    lowres: File = None
    """A picture to start from: super-resolution stages alone draw. Unless it has 64 or 256 px, its
    central square is resized, with a warning."""
    steps: ByStage = None
    """Sampling steps, by stage: a number, at most 10,000, a list of DeepFloyd IF's such as smart50,
    or entries of a table of 1000, as in 999/700/400/100."""
    grid: ByStage = None
    """Spacing of the sampling steps, by stage: uniform, quadratic, logsnr, karras, trailing or
    leading (the last two on a table of 1000)."""
    guidance: ByStage = None
    """Weight of classifier-free guidance, by stage; 1 is none."""
    guidance_plan: ByStage = None
    """The weight over the steps, by stage: constant, interval (at middling noise only; also with
    the noise from and to which, sigma / alpha, as in interval:1.6:100) or oscillating (in every
    other step)."""
    rescale: ByStage = None
    """How far guided predictions get back the contrast of unguided ones, 0 to 1, by stage."""
    aug_level: ByStage = None
    """Noise on the low-resolution picture, 0 to 1, by super-resolution stage."""
    sampler: ByStage = None
    """By stage: ancestral, ddim, dpm++, dpm++sde or heun; with a number for the noise they add,
    ancestral:0.3 (gamma), ddim:0.5 (eta) or heun:0.1 (churn). ddim-predicted and heun-noise are
    diffusers' DDIM and Heun."""
    threshold: ByStage = None
    """By stage: none, static or dynamic (Imagen's), the last also with percentile and cap, as in
    dynamic:0.95:1.5."""
    negative: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """What guidance moves away from, instead of the empty condition."""
    best_of: int = 1
    """Draw so many candidates of each picture in the first stage, and keep the one that --clip
    finds nearest to the prompt; only that one is enlarged. Its seed and all scores are in the
    JSON."""
    clip: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: none)")
    ] = None
    """The CLIP that chooses: a folder as transformers writes it, or a name such as
    openai/clip-vit-large-patch14."""
    text_encoder: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the model's own)")
    ] = None
    """A T5 v1.1 encoder instead of the model's own: a local folder, or a name such as
    google/t5-v1_1-xl, or NAME@REVISION. Its width must be the one the model was trained on."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Pictures drawn together, at most 4096; default 1 on a CPU, 8 elsewhere."""
    split_rows: int = 1
    """Number of this machine's devices that share each super-resolution picture, by its rows of
    pixels: less memory and time for 1024 px."""
    path: Annotated[
        Literal["gif", "strip"] | None,
        tyro.conf.arg(metavar="{gif,strip}", help_behavior_hint="(default: none)"),
    ] = None
    """Show how each picture comes about, by the model's guesses at it from the first step on: gif
    writes OUT/0000.gif, which moves, strip OUT/0000_path.png, a row for each stage."""
    quiet: bool = False
    """Say nothing on stderr but errors: no progress, no warnings."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run starts faster."""


MOST_PICTURES = 1_000_000
"""One command draws at most so many, of all prompts."""
MOST_PROMPT_BYTES = 2**24
"""A file of prompts has at most so many bytes."""
FRAMES = {"gif": 16, "strip": 8}
"""How many guesses of each stage the kinds of --path show."""
LISTS = (
    *("grid", "steps", "guidance", "guidance_plan", "rescale", "aug_level", "sampler"),
    "threshold",
)
"""The options that go by stage, as `runner.overrides` names them."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade sample` with the words after it. Raises UserError for a person's mistake."""
    tasks = that_have("SampleOptions")
    options = config.parse(_with_tasks(tasks), argv, prog="cascade sample")
    prompts = _prompts(options)
    _check_words(options, len(prompts))
    folder = output.folder_of(options.out)
    if options.quiet:
        warnings.simplefilter("ignore")
    if options.compilation_cache:
        from cascade.devices.programs import use_compilation_cache

        use_compilation_cache()
    with distributed.processes():
        _sample(options, [getattr(options, _field(name)) for name in tasks], prompts, folder)


def _with_tasks(tasks: Mapping[str, Any]) -> Any:
    """Options, and beside its own flags those that the tasks add."""
    added = [
        (_field(name), Annotated[own, tyro.conf.arg(name="")], field(default_factory=own))
        for name, own in tasks.items()
    ]
    made: Any = make_dataclass("Options", added, bases=(Options,), frozen=True, kw_only=True)
    made.__doc__ = Options.__doc__
    return made


def _field(module: str) -> str:
    """What holds a task's options: no option of ours is called so."""
    return "of_" + module.replace(".", "_")


def _sample(options: Options, tasks: Sequence[Any], prompts: list[str], folder: paths.Path) -> None:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from tqdm import tqdm

    from cascade.images import load_image
    from cascade.runner.cascade import Cascade, default_batch_size, numbers
    from cascade.runner.overrides import override
    from cascade.runner.progress import Bar

    share = (jax.process_index(), jax.process_count())
    lowres = None if options.lowres is None else np.asarray(load_image(options.lowres))
    cascade = Cascade.load(
        options.model,
        text_encoder=options.text_encoder,
        dtype=options.dtype,
        t5_int8=options.t5_int8,
        offload=options.offload,
    )
    judge = judge_of(options.best_of, options.clip)
    if lowres is not None:
        lowres = cascade.fitted(lowres, until=options.until)
    chosen = cascade.select(until=options.until, lowres=None if lowres is None else len(lowres))
    stages = [stage.config for stage, _ in chosen]
    every = [stage.config for stage, _ in cascade.stages]
    lists = {name: getattr(options, name) for name in LISTS}
    for task in tasks:
        if hasattr(task, "stages"):
            stages = list(task.stages(stages))
    settings = override(stages, every, **lists)
    steering, records = [None] * len(stages), {}
    for task in tasks:
        own = task.steering(stages, every, settings)
        records |= task.record(stages, own)
        if any(given and taken for given, taken in zip(own, steering, strict=True)):
            raise UserError("two of the options steer the same stage: give those of one task")
        steering = [given or taken for given, taken in zip(own, steering, strict=True)]
    if options.random_seed:
        seed = np.uint32(secrets.randbelow(2**32 - options.num + 1))
        if share[1] > 1:
            seed = multihost_utils.broadcast_one_to_all(seed)
        options = replace(options, seed=int(seed))
        if share[0] == 0 and not options.quiet:
            print(f"--seed {options.seed}", file=sys.stderr)
    if share[0] == 0 and len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        warnings.warn(
            f"{len(prompts)} prompts of one word each; a prompt of several words needs quotes: "
            f'"{" ".join(prompts[:5])}"',
            stacklevel=1,
        )
    # All processes count on from what the first one saw before any of them wrote.
    first = output.next_number(folder)
    if share[1] > 1:
        first = int(multihost_utils.broadcast_one_to_all(np.int32(first)))
    total = len(prompts) * options.num
    batch_size = options.batch_size or default_batch_size()
    count = sum(1 for _ in numbers(total, batch_size, share))
    side = 0
    steps = {stage.name: chosen.steps for stage, chosen in zip(stages, settings, strict=True)}
    bar = Bar(
        -(-count // batch_size),
        steps,
        shown=share[0] == 0 and not options.quiet,
        times={stages[0].name: options.best_of},
    )
    pictures = cascade.draw(
        prompts,
        seed=options.seed,
        num=options.num,
        until=options.until,
        size=_size(options.size),
        lowres=lowres,
        negative=options.negative,
        settings=settings,
        steering=steering,
        batch_size=batch_size,
        best_of=options.best_of,
        judge=None if judge is None else judge.likeness,
        share=share,
        split_rows=options.split_rows,
        frames=FRAMES.get(options.path or "", 0),
        progress=bar.told,
    )
    given = ("text_encoder", "dtype", "t5_int8", "lowres")
    record = {name: getattr(options, name) for name in given} | records
    if judge is not None:
        record |= {"clip": options.clip, "clip_sha256": judge.digest}
    record = {name: str(v) if isinstance(v, Path) else v for name, v in record.items()}
    with bar:
        for number, picture in zip(numbers(total, batch_size, share), pictures, strict=True):
            line = output.write(picture, folder, first + number, record, options.path)
            tqdm.write(json.dumps(line), file=sys.stdout)  # which clears the bar from its line
            sys.stdout.flush()
            side = _nearest(picture, min(256, max(picture.images)))
    if share[1] > 1:
        multihost_utils.sync_global_devices("pictures drawn")
    if total > 1 and share[0] == 0:
        output.write_grid(folder, first, prompts, options.num, side)


def _size(word: str | None) -> tuple[int, int] | None:
    if word is None:
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", word)
    if found is None:
        raise UserError(f"--size {word}: must be a height and a width in pixels, such as 64x96")
    return int(found[1]), int(found[2])


def _prompts(options: Options) -> list[str]:
    prompts = [(p, f"prompt {i + 1}") for i, p in enumerate(options.prompts_)]
    if options.prompts is not None:
        path = options.prompts
        paths.check_regular(path)
        try:
            with path.open("rb") as file:
                content = file.read(MOST_PROMPT_BYTES + 1)
            if len(content) > MOST_PROMPT_BYTES:
                raise UserError(
                    f"--prompts {path}: must have at most {MOST_PROMPT_BYTES} bytes; draw it in "
                    "several commands, each of a part of its lines"
                )
            text = content.decode("utf-8-sig")
            lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        except UnicodeDecodeError as e:
            raise UserError(
                f"--prompts {path}: not UTF-8 text (byte {e.start}); save it as UTF-8"
            ) from None
        except OSError as e:
            raise UserError(
                f"--prompts {path}: {e.strerror}; give a text file, one prompt a line"
            ) from None
        written = [line.strip() for line in lines if line.strip()]
        if not written:
            raise UserError(f"--prompts {path}: has no line with a prompt; write one a line")
        prompts += [(line, "") for line in written]
    texts = [prompt for prompt, _ in prompts]
    counts.check_prompts(texts, [where for _, where in prompts])
    return texts


def _check_words(options: Options, prompts: int) -> None:
    counts.check(
        seed=options.seed,
        num=options.num,
        batch_size=options.batch_size,
        split_rows=options.split_rows,
    )
    if options.random_seed and options.seed:
        raise UserError(f"--seed {options.seed} and --random-seed: give one of them")
    check_judge(options.best_of, options.clip)
    for flag, value in {"--model": options.model, "--text-encoder": options.text_encoder}.items():
        if value == "":
            raise UserError(f"{flag} is empty; give a folder or a name, or leave it out")
    if prompts * options.num > MOST_PICTURES:
        raise UserError(
            f"--num {options.num} of {prompts} prompt{'s' * (prompts > 1)}: one command draws at "
            f"most {MOST_PICTURES} pictures; draw them in several, each with a --seed of its own"
        )


def check_judge(best_of: int, clip: str | None) -> None:
    """Raise UserError unless there is a CLIP where there are candidates, and only there."""
    if (best_of > 1) != (clip is not None):
        raise UserError(
            f"--best-of {best_of} and --clip {clip}: go together: the former says how many "
            "candidates there are, 2 or more, the latter who chooses, such as "
            "openai/clip-vit-large-patch14"
        )


def judge_of(best_of: int, clip: str | None) -> CLIP | None:
    """The CLIP that chooses among candidates, if there are several. Raises as `check_judge`, and
    UserError for one that cannot be loaded."""
    check_judge(best_of, clip)
    if clip is None:
        return None
    from cascade.published.clip import load

    return load(clip)


def _nearest(picture: Picture, side: int) -> int:
    return min(picture.images, key=lambda s: abs(s - side))
