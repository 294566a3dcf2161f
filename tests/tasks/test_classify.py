"""Classifier guidance: a network that reads attributes off noise, and what its gradient draws."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import model_folder

from cascade import cli, config, images, testing
from cascade.data import FolderData
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.process import Cosine
from cascade.errors import UserError
from cascade.models import AutoencoderConfig, Network
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model
from cascade.scenes.spec import scene_at
from cascade.stage import Text, TextInput
from cascade.stage.space import Latents
from cascade.tasks.classify import classifier as classifiers
from cascade.tasks.classify.classifier import ClassifierConfig, labels
from cascade.tasks.classify.scenes import ATTRIBUTES, ListedScenes, listed
from cascade.tasks.classify.steering import ClassifierGuidance, guided, guiding
from cascade.tasks.classify.training import ClassifierTraining, accuracy
from cascade.training.job import Job, Optimizer
from cascade.training.loop import fit

UNET = testing.base_stage().network
TINY = ClassifierConfig(attributes=("dark", "light"), resolution=8, network=UNET, features=16)


def own(attributes=("dark", "light"), seed=0):
    """A classifier of 8 px whose weights are random, none of them zero."""
    small = dataclasses.replace(TINY, attributes=attributes)
    return small, testing.lively(Network(small), seed)


# What it is trained on.


def test_a_caption_states_what_stands_in_it_word_by_word():
    names = ("red", "red circle", "circle", "navy background")
    stated = labels(
        names, ["A small red circle.", "redder circles", "circle, red", "a red, circle"]
    )
    wanted = [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]
    np.testing.assert_array_equal(stated["labels"], np.array(wanted, bool))


def test_the_captions_of_listed_scenes_leave_out_nothing():
    scenes = ListedScenes(split="seen", seed=3)
    source = scenes.open(64)
    for index in range(20):
        scene = scene_at(3, index, "seen")
        example = source.drawn(index, np.random.default_rng(0))
        assert example["caption"] == listed(scene) and example["image"].shape == (64, 64, 3)
        (stated,) = labels(ATTRIBUTES, [example["caption"]])["labels"]
        found = {name for name, there in zip(ATTRIBUTES, stated, strict=True) if there}
        things = {name for o in scene.objects for name in (o.colour, o.shape)}
        pairs = {f"{o.colour} {o.shape}" for o in scene.objects}
        assert found == things | pairs | {f"{scene.background} background"}


def test_accuracy_is_one_half_for_who_looks_away_and_one_for_who_is_right():
    there = jnp.array([[True, False, False], [False, False, True]])
    rows = jnp.array([True, True])
    for logits in (jnp.full((2, 3), 5.0), jnp.full((2, 3), -5.0)):
        assert accuracy(logits, there, rows) == 0.5
    right = jnp.where(there, 1.0, -1.0)
    assert accuracy(right, there, rows) == 1 and accuracy(-right, there, rows) == 0
    half = right.at[0].multiply(-1)
    assert accuracy(half, there, jnp.array([False, True])) == 1
    assert accuracy(half, there, jnp.array([True, False])) == 0
    assert accuracy(right, there, ~rows) == 0.5  # of nothing


# The network.


def test_before_training_every_picture_is_the_same_to_it():
    params = jax.jit(Network(TINY).init)(jax.random.key(0, impl="rbg"))
    pictures = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    logits = jax.jit(Network(TINY))(params, pictures, jnp.zeros(3))
    assert logits.shape == (3, 2) and len(np.unique(logits)) == 1


def test_in_pure_noise_it_falls_back_on_what_it_knows_without_looking():
    """Else guidance, which divides by alpha, would follow its errors."""
    _, params = own()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))

    @jax.jit
    def both(x, levels):
        def log_p(x):
            logits = Network(TINY)(params, x, levels)
            return jax.nn.log_sigmoid(logits).sum(), logits

        return jax.grad(log_p, has_aux=True)(x)

    def moved(logsnr):
        """How far guidance with scale 1 moves x0, by the gradient over alpha."""
        return np.abs(both(x, jnp.full(2, logsnr))[0]).max() * np.exp(-logsnr / 2)

    noise = both(x, jnp.full(2, -20.0))[1]
    np.testing.assert_allclose(noise, np.broadcast_to(params["prior"], (2, 2)), atol=1e-2)
    assert 1e-3 < moved(-20.0) < 20 * moved(0.0)


def test_the_gradient_is_that_of_differences():
    """Through all of the network, its written-out convolutions included."""
    _, params = own()
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    levels = jnp.zeros(1)

    @jax.jit
    @jax.value_and_grad
    def log_p(x):
        return jax.nn.log_sigmoid(Network(TINY)(params, x, levels)).sum()

    direction = jax.random.normal(jax.random.key(1), x.shape)
    slope = jnp.vdot(log_p(x)[1], direction)
    h = 1e-3
    differences = (log_p(x + h * direction)[0] - log_p(x - h * direction)[0]) / (2 * h)
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(slope, differences, rtol=2e-2)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"resolution": 7}, "multiples of 2"),
        ({"features": 0}, "features must be"),
        ({"network": dataclasses.replace(UNET, in_channels=4)}, "the 3 of a picture, got 4"),
        ({"attributes": ("Red",)}, "in small letters"),
        ({"attributes": ("red,blue",)}, "no comma"),
        ({"attributes": ("red", "red")}, "no two alike"),
        ({"attributes": ()}, "one or more"),
    ],
)
def test_a_classifier_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


# The job.


@pytest.fixture(scope="module")
def run(one_device, tmp_path_factory):
    """A classifier that was trained to tell dark pictures from light ones."""
    folder = tmp_path_factory.mktemp("classify")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(32):
        low, word = ((0, "dark"), (136, "light"))[i % 2]
        picture = rng.integers(low, low + 120, (8, 8, 3), np.uint8)
        images.save_png(folder / "data" / f"{i}.png", picture)
        (folder / "data" / f"{i}.txt").write_text(f"A {word} picture.")
    job = ClassifierTraining(
        classifier=TINY,
        schedule=Cosine(),
        data=FolderData(path=str(folder / "data")),
        optimizer=Optimizer(learning_rate=1e-2),
        images=6400,
        batch_size=32,
        ema_decay=0.95,
        log_every_images=1600,
        preview_every_images=0,
    )
    fit(job, folder / "run")
    return folder


def test_it_learns_to_tell_clean_pictures_apart_and_not_what_noise_hides(run):
    rows = [json.loads(line) for line in (run / "run" / "metrics.jsonl").open()]
    assert rows[-1]["accuracy_0.00-0.25"] > 0.97 and rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    small, params = classifiers.load(run / "run" / "classifier")
    assert small == TINY
    noise = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    there = jnp.stack([jnp.arange(64) % 2 == 0, jnp.arange(64) % 2 == 1], axis=-1)
    clean = jnp.where(there[:, 0], -0.5, 0.5)[:, None, None, None] + 0.2 * noise
    read = jax.jit(lambda x, logsnr: Network(small)(params, x, jnp.full(64, logsnr)))
    told = read(clean, 6.0)
    assert accuracy(told, there, jnp.ones(64, bool)) > 0.95
    hidden = read(noise, -20.0)
    assert abs(float(accuracy(hidden, there, jnp.ones(64, bool))) - 0.5) < 0.05
    assert np.ptp(hidden, axis=0).max() < 0.05 < 1 < np.ptp(told, axis=0).min()


def test_it_can_begin_with_the_weights_of_the_denoiser_that_it_is_to_guide(tmp_path):
    stage = dataclasses.replace(testing.base_stage(), conditions=(Text(width=128, head_width=8),))
    model_folder(tmp_path / "model", stage)
    fields = {"schedule": Cosine(), "data": ListedScenes(), "images": 8, "batch_size": 8}
    job = ClassifierTraining(classifier=TINY, init=str(tmp_path / "model"), **fields)
    given = open_model(tmp_path / "model").read(stage)["network"]
    params = job.start()
    for name in ("time", "conv_in"):
        jax.tree.map(np.testing.assert_array_equal, params[name], given[name])
    first, theirs = (p["encoder"]["0"]["first"]["residual"] for p in (params, given))
    jax.tree.map(np.testing.assert_array_equal, first, theirs)
    assert jax.tree.structure(params) == jax.tree.structure(Network(TINY).abstract())
    other = dataclasses.replace(TINY, network=dataclasses.replace(UNET, coordinates=True))
    with pytest.raises(UserError, match="is not that of the config"):
        dataclasses.replace(job, classifier=other).start()
    assert dataclasses.replace(job, init=None).start() is None


def test_what_is_saved_is_small_and_read_back_and_damage_is_told(run, tmp_path):
    small, params = own()
    classifiers.save(tmp_path / "c", small, params)
    again, read = classifiers.load(tmp_path / "c")
    assert again == small
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), read, params)
    file = tmp_path / "c" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        classifiers.load(tmp_path / "c")
    with pytest.raises(UserError, match="train one"):
        classifiers.load(tmp_path / "none")


def test_its_kinds_survive_json():
    job = ClassifierTraining(
        classifier=TINY, schedule=Cosine(), data=ListedScenes(), images=8, batch_size=8
    )
    written = json.loads(json.dumps(config.to_json(job)))
    assert config.from_json(Job, written) == job
    place = "cascade.tasks.classify"
    kinds = (written["type"], written["data"]["type"])
    assert kinds == (f"{place}.training.ClassifierTraining", f"{place}.scenes.ListedScenes")
    with pytest.raises(ValueError, match="most_bad must be in"):
        dataclasses.replace(job, most_bad=2.0)


# Guidance.


@pytest.fixture(scope="module")
def cascade():
    return testing.cascade()


def drawn(cascade, steering, seeds=1, **options):
    options = {"until": 8, "batch_size": seeds, **options}
    found = cascade("a b", num=seeds, steering=[steering], **options)
    return np.stack([picture.image for picture in found]).astype(int)


def test_a_larger_scale_draws_more_of_what_is_asked_for(cascade, run):
    trained = classifiers.load(run / "run" / "classifier")
    stage = cascade.stages[0][0].config

    def brightness(name, scale, **options):
        steering = guiding(stage, trained, name, scale)
        return drawn(cascade, steering, 4, **options).mean()

    for options in ({"guidance": 0.0}, {"guidance": 3.0}):  # alone, and beside the stage's own
        dark, darker = (brightness("dark", s, **options) for s in (0.3, 4.0))
        plain = drawn(cascade, None, 4, **options).mean()
        light = brightness("light", 4.0, **options)
        assert darker + 1 < dark < plain < light - 2


def test_without_scale_or_attributes_the_picture_is_that_of_no_guidance(cascade):
    small, params = own()
    stage = cascade.stages[0][0].config
    plain = drawn(cascade, None)
    none = guiding(stage, (small, params), "dark", 0.0)
    open_ = dataclasses.replace(none, asked=np.zeros(2, np.float32), scale=np.float32(9))
    for steering in (none, open_):
        assert np.abs(drawn(cascade, steering) - plain).max() <= 1  # rounded to a level
    assert (drawn(cascade, guiding(stage, (small, params), "dark", 30.0)) != plain).any()


def test_a_picture_is_the_same_in_any_batch_and_its_own_row_alone_guides_it(cascade):
    stage = cascade.stages[0][0].config
    steering = guiding(stage, own(), "dark", 8.0)
    together = drawn(cascade, steering, 3)
    alone = drawn(cascade, steering, 3, batch_size=1)
    assert np.abs(together - alone).max() <= 1
    stage_, params = cascade.stages[0]
    rows = dataclasses.replace(
        steering.repeated(2), scale=jnp.array([0.0, 8.0]), asked=jnp.array([[1.0, 0], [1, 0]])
    )
    encoded = cascade.encoder(["a b", "a b"])
    told = {"text": TextInput(encoded.values, encoded.mask)}
    keys = jax.random.split(jax.random.key(0), 2)
    keys = jnp.stack([keys[0], keys[0]])

    def sample(steering):
        return stage_.sample(params, told, keys, settings=stage.sampling, steering=steering)

    mixed, none, all_ = (
        np.asarray(sample(dataclasses.replace(rows, scale=jnp.array(scales))))
        for scales in ([0.0, 8.0], [0.0, 0.0], [8.0, 8.0])
    )
    np.testing.assert_allclose(mixed[0], none[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], all_[1], atol=1e-5)
    assert np.abs(mixed[0] - mixed[1]).max() > 1e-2


def test_weights_are_held_once_whatever_the_batch():
    small, params = own()
    one = ClassifierGuidance(
        asked=np.ones(2, np.float32), scale=np.float32(2), params=params, classifier=small
    )
    many = one.repeated(5)
    assert many.asked.shape == (5, 2) and many.scale.shape == (5,) and many.params is params
    assert one.names == ["dark", "light"]


# The command.


@pytest.fixture
def folder(tmp_path, monkeypatch, cascade):
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
    monkeypatch.chdir(tmp_path)
    classifiers.save(tmp_path / "own", *own(("red circle", "red", "navy background")))
    classifiers.save(tmp_path / "large", dataclasses.replace(TINY, resolution=16), own()[1])
    return tmp_path


def test_the_command_guides_the_first_stage_and_records_it(folder, cascade):
    words = ["sample", "a b", "--until", "16", "--no-compilation-cache", "--classifier", "own"]
    more = ["--attributes", "red circle,  Navy background", "--attribute-scale", "20"]
    cli.main([*words, *more])
    cli.main(["sample", "a b", "--until", "16", "--no-compilation-cache"])
    guided, plain = (
        np.asarray(images.load_image(folder / "samples" / f"000{i}_8.png")) for i in (0, 1)
    )
    assert (guided != plain).any()
    first, second = (json.loads((folder / "samples" / f"000{i}.json").read_text()) for i in (0, 1))
    told = {"asked": ["red circle", "navy background"], "scale": 20.0, "classifier": "own"}
    assert first["attributes"] == told and second["attributes"] is None
    # Dynamic thresholding would dim a picture for the few pixels that a gradient raises.
    kinds = [one["stages"]["base8"]["threshold"]["kind"] for one in (first, second)]
    assert kinds == ["static", "dynamic"]
    cli.main([*words, *more, "--threshold", "dynamic"])
    third = json.loads((folder / "samples" / "0002.json").read_text())
    assert third["stages"]["base8"]["threshold"]["kind"] == "dynamic"


@pytest.mark.parametrize(
    "words,message",
    [
        (["--attribute-scale", "4"], "--attribute-scale 4.0: goes with --attributes"),
        (["--classifier", "own"], "--classifier own: goes with --attributes"),
        (["--attributes", "red", "--attribute-scale", "-1"], "--attribute-scale -1.0: must be in"),
        (["--attributes", "red", "--attribute-scale", "nan"], "--attribute-scale nan: must be in"),
        (["--attributes", "red cirle"], "'red cirle' is not known; did you mean red circle"),
        (["--attributes", "xyz"], "'xyz' is not known; it knows 3, such as red circle, red"),
        (["--attributes", ""], "'' is not known"),
        (["--attributes", "red", "--classifier", "no"], "classifier no: holds no config.json"),
        (["--attributes", "dark", "--classifier", "large"], "draws 8 px, and the classifier is of"),
    ],
)
def test_what_cannot_be_guided_is_one_line(words, message, folder, capsys):
    if "--attributes" in words and "--classifier" not in words:
        words = [*words, "--classifier", "own"]
    with pytest.raises(SystemExit):
        cli.main(["sample", "a b", "--until", "8", "--no-compilation-cache", *words])
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (folder / "samples").exists()


def test_a_stage_that_draws_in_latents_is_not_guided():
    autoencoder = AutoencoderConfig(widths=(8, 8), blocks=1, groups=4, scaling=0.2)
    base = testing.base_stage()
    latent = dataclasses.replace(
        base,
        space=Latents(resolution=8, autoencoder=autoencoder),
        network=dataclasses.replace(base.network, in_channels=4, out_channels=4),
        sampling=dataclasses.replace(base.sampling, threshold=Threshold(kind="none")),
    )
    assert guided(latent) == latent and guided(base).sampling.threshold.kind == "static"
    with pytest.raises(UserError, match="stage base8 draws in Latents, and a classifier is of"):
        guiding(latent, own(), "dark", 1.0)


# What ships.


def test_the_classifier_that_ships_is_what_its_config_trains_and_is_small():
    job = config.load("configs/classify/attributes64.py")
    shipped, _ = classifiers.load()
    assert shipped == job.classifier and job.schedule == open_model("scenes").stages[0].schedule
    assert (classifiers.SHIPPED / "model.safetensors").stat().st_size < 2e6
