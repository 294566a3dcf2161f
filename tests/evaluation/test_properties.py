"""`cascade eval properties`: its margins against closed forms, its measures on models whose answer
is known, both where a property holds and where it does not."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade import images, testing
from cascade.commands import eval as evaluate
from cascade.config import from_json, to_json
from cascade.diffusion import process
from cascade.diffusion.denoise import Constant
from cascade.errors import UserError
from cascade.evaluation import augmentation, properties
from cascade.evaluation.claims import NEEDED, Claim, Property, above, alike
from cascade.evaluation.drawer import Drawer
from cascade.models import EfficientLevel, EfficientUNetConfig, Level, UNetConfig
from cascade.published.earlier_versions import upgraded
from cascade.runner.cascade import Cascade, Picture
from cascade.scenes.captions import caption_at
from cascade.scenes.render import render
from cascade.stage import Augmentation, LowRes, Pixels, Sampling, Stage, StageConfig, Text
from cascade.storage.checkpoint import Checkpoints

REPOSITORY = Path(__file__).parents[2]

# Claims.


def claim(differences):
    return Claim(text="", differences=np.array(differences, float))


def test_the_margin_counts_all_pictures_where_seeds_agree():
    one = claim([[0, 2, 4], [4, 0, 2]])
    assert one.standard_error == pytest.approx(np.std([0, 2, 4, 4, 0, 2], ddof=1) / np.sqrt(6))
    assert one.margin == pytest.approx(2 / one.standard_error) and one.holds


def test_the_margin_counts_seeds_where_pictures_of_a_seed_agree():
    one = claim([[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    assert one.standard_error == pytest.approx(1 / np.sqrt(3))
    assert one.margin == pytest.approx(2 * np.sqrt(3))


def test_luck_alone_makes_a_claim_hold_about_as_rarely_as_is_said():
    draws = np.random.default_rng(0).standard_normal((1000, 3, 8))
    held = np.mean([claim(d).holds for d in draws])
    assert 0.002 < held < 1 / 44 + 3 * np.sqrt(1 / 44 / 1000)
    assert np.mean([claim(d + 1).holds for d in draws]) > 0.95


def test_differences_without_spread_are_of_infinite_margin_or_none():
    assert claim([[1, 1], [1, 1]]).margin == np.inf and claim([[1, 1], [1, 1]]).holds
    assert not claim([[0, 0], [0, 0]]).holds and not claim([[-1, -1], [-1, -1]]).holds
    assert claim([[1, 1], [1, 1]]).as_json()["margin"] is None
    json.dumps(claim([[1, 1], [1, 1]]).as_json(), allow_nan=False)
    with pytest.raises(ValueError, match="two seeds and two pictures"):
        claim([[1, 2]])


@pytest.mark.parametrize("shift,same", [(0.0, True), (0.9, True), (1.1, False), (-1.1, False)])
def test_alike_is_to_be_shown_and_not_to_be_assumed(shift, same):
    a, b = 0.1 * np.random.default_rng(0).standard_normal((2, 3, 20))
    assert all(one.holds for one in alike("", a + shift, b, within=1.0)) == same
    few = alike("", 100 * a[:, :2], 100 * b[:, :2], within=1.0)
    assert not all(one.holds for one in few)


def test_a_property_holds_with_all_of_its_claims_and_shows_its_least_margin():
    big, small = np.array([[3.0, 4], [4, 3]]), np.array([[1.0, 1], [1, 1]])
    claims = [above("yes", big, small), above("no", small, big)]
    one = Property(title="t", unit="u", how="h", figures={"big": big}, claims=claims, chance=0.5)
    report = one.as_json()
    assert not one.holds and report["holds"] is False
    assert report["margin"] == round(claims[1].margin, 2) < 0
    assert report["figures"] == {"big": {"mean": 3.5, "by_seed": [3.5, 3.5]}}
    assert [c["holds"] for c in report["claims"]] == [True, False]
    assert dataclasses.replace(one, claims=claims[:1]).holds


# Models whose answer is known.


class Painter(Cascade):
    """64 -> 256 px; paint(prompt, seed, settings, lowres) makes its pictures."""

    def __init__(self, paint):
        base = UNetConfig(levels=(Level(width=8, blocks=1),), head_width=8)
        upper = EfficientUNetConfig(levels=(EfficientLevel(width=8, blocks=1),), head_width=8)
        text = Text(width=8, head_width=8)
        lowres = LowRes(resolution=64, augmentation=Augmentation(max_level=0.4))
        configs = [
            StageConfig(
                name="base64", space=Pixels(resolution=64), conditions=(text,), network=base
            ),
            StageConfig(
                name="sr256",
                space=Pixels(resolution=256),
                conditions=(lowres, text),
                network=upper,
            ),
        ]
        super().__init__([(Stage(c), {}) for c in configs], testing.FakeEncoder(), name="painter")
        self.paint = paint

    def draw(self, prompts, *, seed, until=None, lowres=None, settings=None, **rest):
        assert not rest
        yield Picture(prompts, seed, {until: self.paint(prompts, seed, settings[0], lowres)}, {})


def drawer(paint):
    model = Painter(paint)
    settings = {stage.config.name: stage.config.sampling for stage, _ in model.stages}
    return Drawer(cascade=model, settings=settings)


PROMPTS = properties.prompts_of(0, 8)
SCENES = {p.said.text: p.scene for row in PROMPTS for p in row}


def obeys(prompt, seed, settings, lowres):
    """In one picture of four for each unit of guidance, draws what the prompt says."""
    told = seed % 4 < round(settings.guidance)
    return render(SCENES[prompt] if told else caption_at(99, seed, "seen")[0], 64)


def deaf(prompt, seed, settings, lowres):
    """Draws what its seed says."""
    return render(caption_at(99, seed, "seen")[0], 64)


def test_seeds_share_neither_prompts_nor_noise():
    seeds = [p.seed for row in PROMPTS for p in row]
    assert len(PROMPTS) == 3 and len(set(seeds)) == len(seeds) == 24
    assert len(SCENES) == 24
    first = PROMPTS[1][0]
    assert first.said == caption_at(first.seed, 0, "seen")[1]


def test_a_model_that_obeys_guidance_follows_and_falls_to_chance():
    count = []
    grows, falls = properties.following(drawer(obeys), PROMPTS, lambda: count.append(1))
    assert grows.holds and falls.holds and len(count) == 3 * 24
    assert grows.figures["w=4"].min() == grows.figures["true pictures"].min() == 1
    # As true pictures, it is right about other prompts as often as these, exactly.
    assert falls.figures["other prompts"].mean() == falls.chance == grows.chance
    assert 0.05 < falls.chance < 0.4


def test_prompt_following_that_falls_again_does_not_grow():
    middle = properties.weights_of(drawer(obeys))[1]

    def confused(prompt, seed, settings, lowres):
        told = settings.guidance == middle or seed % 4 < settings.guidance / 2
        return render(SCENES[prompt], 64) if told else deaf(prompt, seed, settings, lowres)

    grows, _ = properties.following(drawer(confused), PROMPTS)
    assert [claim.holds for claim in grows.claims] == [True, True, False] and not grows.holds


def test_a_model_that_is_deaf_to_its_prompt_neither_follows_nor_falls():
    grows, falls = properties.following(drawer(deaf), PROMPTS)
    assert not grows.holds and not falls.holds
    assert [claim.margin for claim in grows.claims] == [0, 0, np.inf]
    assert falls.figures["own prompt"].mean() == pytest.approx(falls.chance, abs=0.1)


def test_captions_that_are_all_the_same_do_not_fall_to_chance():
    model = drawer(lambda prompt, *rest: render(SCENES[prompt], 64))
    same = [[dataclasses.replace(p, said=row[0].said) for p in row] for row in PROMPTS]
    _, falls = properties.following(model, same)
    assert not falls.holds and not falls.claims[0].holds and not falls.claims[1].holds


def saturating(shares):
    """Pixel values saturate with the probability that shares has for the thresholding."""

    def paint(prompt, seed, settings, lowres):
        assert settings.guidance == properties.SATURATING
        assert settings.guidance_plan == Constant()
        rng, share = np.random.default_rng(seed), shares[settings.threshold.kind]
        ends = 255 * rng.integers(0, 2, (64, 64, 3))
        return np.where(rng.random((64, 64, 3)) < share, ends, 100).astype(np.uint8)

    return paint


def test_saturation_holds_in_the_order_of_imagen_alone():
    right = {"none": 0.3, "static": 0.2, "dynamic": 0.1}
    one = properties.saturation(drawer(saturating(right)), PROMPTS)
    assert one.holds and one.chance == 0
    for kind, share in right.items():
        assert one.figures[kind].mean() == pytest.approx(share, abs=0.01)
    for wrong in ({"none": 0.2, "static": 0.2}, {"static": 0.1, "dynamic": 0.2}):
        assert not properties.saturation(drawer(saturating(right | wrong)), PROMPTS).holds


@pytest.mark.parametrize(
    "reach,holds",
    [
        ({0: 0, 0.2: 20, 0.4: 40}, True),
        ({0: 20, 0.2: 20, 0.4: 40}, True),
        ({0: 9, 0.2: 9, 0.4: 9}, False),
        ({0: 20, 0.2: 10, 0.4: 40}, False),
        ({0: 0, 0.2: 40, 0.4: 40}, False),
    ],
)
def test_sensitivity_is_how_far_pictures_go_with_their_prompts(reach, holds):
    def paint(prompt, seed, settings, lowres):
        assert lowres.shape == (64, 64, 3)
        fill = reach[round(settings.aug_level, 1)] * (len(prompt) % 2) + seed % 3
        return np.full((256, 256, 3), round(fill), np.uint8)

    one = properties.sensitivity(drawer(paint), PROMPTS[:2])
    assert one.holds == holds and list(one.figures) == ["level 0", "level 0.2", "level 0.4"]
    apart = np.mean(
        [
            len({len(p.said.text) % 2, len(row[i - 1].said.text) % 2}) - 1
            for row in PROMPTS[:2]
            for i, p in enumerate(row)
        ]
    )
    assert one.figures["level 0.4"].mean() == pytest.approx(apart * reach[0.4])


# Stages whose answer is known: `enlarge` stands for the sampling of `testing`'s super-resolution.


class Enlarger(Stage):
    def __init__(self, enlarge):
        config = testing.super_resolution_stage(16)
        levels = tuple(dataclasses.replace(level, stride=1) for level in config.network.levels)
        network = dataclasses.replace(config.network, levels=levels)
        space = Pixels(resolution=64)
        super().__init__(dataclasses.replace(config, space=space, network=network))
        self.enlarge = enlarge

    def sample(self, params, given, keys, *, settings, sides=None):
        return self.enlarge(given["lowres"][0], keys, settings.aug_level)


def noisy(lowres, keys, level, brighter=0.0):
    side = 4 * lowres.shape[1]
    big = images.upsample(jnp.asarray(lowres), (side, side))
    return big + 0.05 * jax.random.normal(keys[0], big.shape) + brighter * (side > 16)


def larger(enlarge):
    stage = Enlarger(enlarge)
    model = Cascade([(stage, {})], testing.FakeEncoder())
    settings = {stage.config.name: stage.config.sampling}
    few = properties.quarter(PROMPTS)
    return properties.larger_pictures(Drawer(cascade=model, settings=settings), few)


def test_a_stage_that_draws_alike_at_any_size_runs_on_larger_images():
    one = larger(noisy)
    assert one.holds and "without self-attention" in one.how
    # Two draws of the same with noise of standard deviation s differ by 2 s / sqrt(pi).
    apart = 2 * 0.05 * 127.5 / np.sqrt(np.pi)
    assert one.chance == pytest.approx(apart, rel=0.1)
    assert one.figures["larger from crop"].mean() == pytest.approx(apart, rel=0.1)


def test_a_stage_that_brightens_large_pictures_does_not():
    one = larger(lambda *inputs: noisy(*inputs, brighter=0.1))
    held = {claim.text: claim.holds for claim in one.claims}
    assert not one.holds and not held["mean: not above by 2.55"] and held["mean: not below by 2.55"]
    assert held["standard deviation: not above by 2.55"]


def blind_to_noise(lowres, keys, level):
    """Draws what the clean picture shows, whatever noise it is told of."""
    return images.upsample(jnp.asarray(lowres), (64, 64))


def sharpening(lowres, keys, level):
    """Takes every pixel of the small picture for the truth, and enhances it."""
    if level:
        noise = jax.random.normal(keys[0], lowres.shape)
        lowres = process.corrupt(
            lowres, noise, process.Cosine().logsnr(jnp.full(len(lowres), level))
        )
    return 1.1 * jnp.repeat(jnp.repeat(jnp.asarray(lowres), 4, 1), 4, 2)


@pytest.mark.parametrize(
    "augmented,plain,holds",
    [
        (blind_to_noise, sharpening, True),
        (sharpening, sharpening, False),
        (blind_to_noise, blind_to_noise, False),
    ],
)
def test_survival_is_of_the_one_stage_and_not_of_the_other(augmented, plain, holds):
    pair = tuple((Enlarger(enlarge), {}) for enlarge in (augmented, plain))
    one = augmentation.survival([pair] * 3, [0, 1, 2], 6)
    assert one.holds == holds
    # Noise of a known size, enlarged bilinearly, loses the mean square of the weights of two axes.
    assert 5 < one.chance < 20


def test_the_pair_is_alike_but_for_the_augmentation():
    augmented, plain = augmentation.pair_of_configs(3)
    assert augmented.stage.lowres.augmentation.max_level >= augmentation.LEVEL
    assert plain.stage.lowres.augmentation.max_level == 0
    lowres = dataclasses.replace(
        plain.stage.lowres, augmentation=augmented.stage.lowres.augmentation
    )
    stage = dataclasses.replace(plain.stage, conditions=(lowres,))
    assert dataclasses.replace(plain, stage=stage) == augmented


def test_a_trained_stage_has_the_averaged_weights_of_the_trainer(tmp_path, monkeypatch):
    def train(config, folder):
        checkpoints = Checkpoints(folder)
        weights = {"train": {"w": jnp.zeros(2)}, "ema": {"w": jnp.ones(2)}}
        checkpoints.save(1, **weights, config=to_json(config), data={})
        checkpoints.close()
        return True

    monkeypatch.setattr(augmentation.loop, "fit", train)
    config, _ = augmentation.pair_of_configs(0)
    stage, params = augmentation.trained(config, tmp_path)
    assert stage.config == config.stage and params["w"].tolist() == [1, 1]


def test_a_stage_whose_training_was_stopped_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(augmentation.loop, "fit", lambda config, folder: False)
    with pytest.raises(KeyboardInterrupt):
        augmentation.trained(augmentation.pair_of_configs(0)[0], tmp_path)


# The command.


def painted(prompt, seed, settings, lowres):
    if lowres is not None:
        number = list(SCENES).index(prompt) % 8
        return np.full((256, 256, 3), round(50 * settings.aug_level) * number, np.uint8)
    return obeys(prompt, seed, settings, lowres)


@pytest.fixture
def painter(monkeypatch):
    """Makes every model a Painter, without its last stage's sampling and without training."""
    model = Painter(painted)
    stand_in = Property(
        title="stand-in",
        unit="none",
        how="told",
        figures={"figure": np.ones((3, 2))},
        claims=[claim(np.ones((3, 2)))],
    )
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: model))
    monkeypatch.setattr(augmentation, "augmentation", lambda seeds, pictures: stand_in)
    monkeypatch.setattr(properties, "larger_pictures", lambda *inputs: stand_in)
    return model


def test_the_command_reports_every_property_of_three_seeds(painter, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["properties", "--prompts", "8", "--out", str(out), "--no-compilation-cache"]
    evaluate.main(argv)
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((out / "results.json").read_text())
    assert (out / "properties.png").read_bytes()[:4] == b"\x89PNG"
    assert list(report["properties"]) == list("abcdef") and report["seeds"] == [0, 8, 16]
    for one in report["properties"].values():
        assert all(len(figure["by_seed"]) == 3 for figure in one["figures"].values())
        assert one["holds"] == all(
            c["margin"] is None or c["margin"] >= NEEDED for c in one["claims"]
        )
    # This one's pictures do not saturate at all.
    held = {name: one["holds"] for name, one in report["properties"].items()}
    assert held == dict(a=True, b=True, c=False, d=True, e=True, f=True)
    assert report["holds"] is False
    assert "(c) DOES NOT HOLD" in captured.err and "(a) holds" in captured.err


def test_the_committed_report_is_of_the_weights_and_settings_that_ship():
    report = json.loads((REPOSITORY / "launch/properties.json").read_text())
    model = Cascade.load("scenes")
    assert report["model_sha256"] == model.digest
    measured = {
        name: from_json(Sampling, upgraded(settings))
        for name, settings in report["settings"].items()
    }
    assert measured == {stage.config.name: stage.config.sampling for stage, _ in model.stages}
    assert report["holds"] and all(one["holds"] for one in report["properties"].values())


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--prompts", "7"], "--prompts must be 8 or more, got 7"),
        (["--seed", "4294967290"], "--seed must be in"),
        (["--steps", "1,2,3"], "3 values for 2 stages"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(painter, tmp_path, argv, message):
    with pytest.raises(UserError) as e:
        evaluate.main(["properties", *argv, "--out", str(tmp_path / "o"), "--no-compilation-cache"])
    assert message in str(e.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stages,message", [(1, "no super-resolution"), (0, "draws 8")])
def test_models_without_these_properties_are_refused(painter, monkeypatch, stages, message):
    if stages:
        painter.stages = painter.stages[:stages]
    else:
        painter.stages = [(Stage(testing.base_stage()), {})]
    with pytest.raises(UserError, match=message):
        evaluate.main(["properties", "--no-compilation-cache"])
