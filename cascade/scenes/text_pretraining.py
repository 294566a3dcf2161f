"""Pretraining of a small T5 encoder on captions of drawn scenes.

A diffusion model asks of its text encoder what a bag of words does not give: at the word "circle",
which colour, and whether it is the one above. Beside the two tasks that any captions give (see
training/text_job.py) a third one asks for it:

    description       a whole caption -> all that it says of the thing at one of its nouns

The decoder is shown the encoder's output at that noun alone.

A thousand steps suffice for looks, and two thousand for places.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from cascade import ranges
from cascade.scenes.captions import Caption, captions, mentions
from cascade.scenes.spec import Split, generator, scene_at
from cascade.text.tokenizer import Tokenizer
from cascade.training.text_job import Example, TextJob, Texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPretraining(TextJob):
    """Make a text encoder of captions of scenes. It ends in WORKDIR/text_encoder."""

    described: float = 0.5
    """Share of the examples that are descriptions, in [0, 1]; what is neither described nor retold
    is corrupted."""

    def __post_init__(self):
        super().__post_init__()
        ranges.real(self, 0, 1, "described")
        if self.described + self.retold > 1:
            raise ValueError(
                "TextPretraining.described and retold are shares of the examples, at most 1 "
                f"together, got {self.described} and {self.retold}"
            )

    def texts(self):
        return _SceneTexts(self)


class _SceneTexts(Texts):
    others = "held-out captions"

    @property
    def tasks(self):
        described, retold = self.job.described, self.job.retold
        return {
            "description": described,
            "retelling": retold,
            "span corruption": 1 - described - retold,
        }

    def vocabulary(self) -> Iterator[str]:
        job = self.job
        for index in range(job.vocabulary_captions):
            rng = generator(job.seed, index, "train", purpose=3)
            yield captions(scene_at(job.seed, index, "train"), rng, 1)[0].text
        words = _COMMON_WORDS.split()
        rng = np.random.Generator(np.random.PCG64(job.seed))
        for _ in range(max(job.vocabulary_captions // 4, 50)):
            yield " ".join(words[int(rng.random() * len(words))] for _ in range(10))

    def generator(self, number, purpose, other=False):
        return generator(self.job.seed, number, _split(other), purpose=purpose)

    def captions(self, index, rng, most, other):
        scene = scene_at(self.job.seed, index, _split(other))
        return [caption.text for caption in captions(scene, rng, most)]

    def of_task(self, task, tokenizer, index, rng, other):
        if task != "description":
            return super().of_task(task, tokenizer, index, rng, other)
        # One thing alone stands nowhere.
        scene = scene_at(self.job.seed, index, _split(other), min_objects=2)
        return description(self.job, tokenizer, captions(scene, rng, 1)[0], rng)


def _split(other: bool) -> Split:
    return "seen" if other else "train"


def description(
    job: TextPretraining, tokenizer: Tokenizer, caption: Caption, rng: np.random.Generator
) -> Example:
    """One noun of a caption -> what the caption says of its thing, that noun alone visible."""
    nouns = mentions(caption)
    start, said = nouns[int(rng.random() * len(nouns))]
    # Pieces never cross a space: those of a beginning are the beginning of the pieces.
    first = len(tokenizer.pieces(caption.text[:start].rstrip()))
    source, target = (tokenizer.pieces(t)[: job.length - 1] for t in (caption.text, said))
    visible = np.arange(len(source) + 1) == first
    return Example(
        source=np.asarray(source),
        target=np.asarray(target),
        visible=visible | ~visible.any(),  # all, if the noun was cut off
    )


# Words that captions lack and prompts may have: the vocabulary gets pieces for them.
_COMMON_WORDS = """
a an the this that these those some any no not and or but with without of in on at by to from for
near far over under above below beside behind before after between among around across through
into onto out up down off left right top bottom middle center centre front back corner edge side
inside outside next facing toward i you he she it we they his her its their my your our who what
where when why how which all each every both few many much more most other another same different
such only very too so as than like just also again one two three four five six seven eight nine
ten hundred thousand first second third last half double single pair is are was were be been being
has have had do does did can could will would should may might must make makes made draw drawn
paint painted painting show shows showing stand stands standing sit sits sitting lie lies lying
run runs running walk walking fly flies flying jump jumping swim swimming ride riding hold holding
wear wearing eat eating drink drinking play playing look looking sleep sleeping smile smiling
dance dancing sing hang hanging float floating fall falling rise rising glow glowing burn burning
open closed broken empty full picture photo photograph image drawing sketch art illustration
poster portrait logo icon symbol sign pattern style watercolor oil pencil ink pixel cartoon
realistic abstract modern vintage minimal detailed simple red orange yellow lime green cyan blue
purple pink brown black white gray grey navy mint lavender gold golden silver bronze teal
turquoise violet magenta maroon beige ivory crimson scarlet indigo olive tan peach coral dark
light bright pale deep vivid soft pastel neon colorful colored transparent shiny matte warm cool
circle square triangle star ring cross heart diamond shape shapes line lines dot dots stripe
stripes striped dotted checkered check checks plain spot spots spotted round oval rectangle
pentagon hexagon cube sphere ball cone cylinder pyramid disc disk box block arrow spiral wave
curve grid plus big small large little tiny huge tall short long wide narrow thin thick fat high
low flat giant medium size new old young good bad beautiful pretty cute happy sad angry scary
funny strange fast slow hot cold wet dry clean dirty heavy soft hard smooth rough sharp sweet
fresh wild quiet loud rich poor man woman boy girl child baby people person king queen doctor
soldier astronaut robot monster ghost witch face head hair eye eyes ear nose mouth hand arm leg
foot body cat dog horse cow pig sheep goat bird fish duck chicken rabbit mouse bear lion tiger
elephant monkey fox wolf deer frog snake turtle owl eagle penguin whale shark dolphin bee
butterfly spider ant dragon dinosaur panda tree flower rose grass leaf leaves plant forest garden
park field mountain hill river lake sea ocean beach island desert cave rock stone sand snow ice
rain cloud clouds sky sun moon star stars night day morning evening sunset sunrise storm wind fire
water smoke light shadow rainbow space planet earth world galaxy house home building castle tower
bridge road street city town village church school shop market farm room kitchen bed table chair
desk door window wall floor roof stairs lamp clock mirror car truck bus train bicycle bike boat
ship plane airplane rocket wheel apple banana orange lemon grape cherry strawberry bread cake
pizza cheese egg coffee tea cup glass bottle plate bowl spoon fork knife book paper pen pencil
phone computer camera guitar piano drum hat shirt dress shoe shoes coat bag umbrella glasses crown
sword shield flag balloon kite toy gift candle key wood wooden metal steel iron brick plastic
paper leather fabric background foreground surface scene view object objects thing things color
colors colour colours
"""
