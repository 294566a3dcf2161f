"""Drawing takes memory for a batch, however many prompts and pictures there are."""

import itertools
import tracemalloc

import numpy as np
import pytest

from cascade import cli, testing
from cascade.commands import sample as sample_command
from cascade.errors import UserError
from cascade.runner import cascade as runner
from cascade.runner import output
from cascade.runner.cascade import numbers
from cascade.runner.drawing import ToldInParts


@pytest.fixture(scope="module")
def cascade():
    return testing.cascade()


class Counted:
    """An encoder that remembers how many texts it was asked for at a time."""

    def __init__(self, encoder):
        self.encoder, self.asked = encoder, []

        self.tokenize = encoder.tokenize

    def __call__(self, texts):
        self.asked.append(len(texts))
        return self.encoder(texts)


def test_prompts_are_embedded_as_they_come_up(cascade, monkeypatch):
    encoder = Counted(cascade.encoder)
    monkeypatch.setattr(cascade, "encoder", encoder)
    monkeypatch.setattr(runner, "PROMPTS_AT_ONCE", 3)
    drawn = cascade.draw([f"a {i}" for i in range(1000)], until=8, batch_size=2)
    list(itertools.islice(drawn, 2))
    assert encoder.asked == [3]
    list(itertools.islice(drawn, 2))  # of this batch one is in the next part
    assert encoder.asked == [3, 3]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pictures_are_the_same_however_many_prompts_are_embedded_together(
    cascade, monkeypatch, batch_size
):
    prompts = ["red circle", "blue square", "green ring", "grey star"]
    options = {"num": 2, "until": 8, "batch_size": batch_size, "negative": "grey"}
    whole = cascade(prompts, **options)
    monkeypatch.setattr(runner, "PROMPTS_AT_ONCE", 3)
    parts = cascade(prompts, **options)
    assert [(p.prompt, p.seed) for p in parts] == [(p.prompt, p.seed) for p in whole]
    for one, other in zip(parts, whole, strict=True):
        # Another number of rows is another program, which may round a last bit otherwise.
        assert np.abs(one.image.astype(int) - other.image).max() <= 1


def test_each_prompt_may_have_a_seed_of_its_own(cascade):
    options = {"num": 2, "until": 8, "batch_size": 2}
    drawn = cascade(["red circle", "blue square"], seed=[7, 300], **options)
    alone = [
        *cascade("red circle", seed=7, **options),
        *cascade("blue square", seed=300, **options),
    ]
    assert [(p.prompt, p.seed) for p in drawn] == [(p.prompt, p.seed) for p in alone]
    assert [p.seed for p in drawn] == [7, 8, 300, 301] == [p.metadata["seed"] for p in drawn]
    for one, other in zip(drawn, alone, strict=True):
        assert np.abs(one.image.astype(int) - other.image).max() <= 1
    assert not np.array_equal(drawn[0].image, drawn[1].image)


def test_a_batch_is_told_of_its_own_prompts_also_where_it_lies_in_two_parts():
    def told(part):
        rows = np.arange(10)[part]
        return [({"text": (rows,)}, {"text": (rows,), "none": (np.array([7]),)})]

    parts = ToldInParts(told, at_once=3)
    for rows in ([1, 2], [2, 3], [2, 2, 3], [3, 5], [5, 6], [8, 9]):  # of 0-2, 3-5, 6-8 and 9
        ((given, away),) = parts(rows)
        assert given["text"][0].tolist() == away["text"][0].tolist() == rows
        assert away["none"][0].tolist() == [7] * len(rows)


def test_a_process_embeds_only_the_prompts_of_its_share(cascade, monkeypatch):
    encoder = Counted(cascade.encoder)
    monkeypatch.setattr(cascade, "encoder", encoder)
    monkeypatch.setattr(runner, "PROMPTS_AT_ONCE", 1)
    drawn = cascade(["red", "blue", "grey", "green"], until=8, share=(1, 2))
    assert [p.prompt for p in drawn] == ["blue", "green"]
    assert encoder.asked == [1, 1]


def test_a_hundred_million_pictures_are_begun_in_no_memory(cascade):
    next(cascade.draw("red", until=8, num=1))
    tracemalloc.start()
    try:
        drawn = cascade.draw("red", until=8, num=100_000_000)
        assert next(drawn).seed == 0
        assert next(numbers(100_000_000, 8, (1, 2))) == 8
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "words,message",
    [
        (["--num", "100000000"], "--num 100000000 of 2 prompts: .* at most 1000000 pictures"),
        (["--num", "500001"], "--num 500001 of 2 prompts"),
        (["--batch-size", "4097"], "batch_size=4097: must be at most 4096"),
    ],
)
def test_more_than_one_command_draws_is_refused_before_a_model_is_opened(
    monkeypatch, tmp_path, capsys, words, message
):
    monkeypatch.setattr(runner.Cascade, "load", lambda *a, **k: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=message):
        sample_command.main(["a", "b", *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    assert "a million in all" in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_a_file_of_prompts_is_read_up_to_its_limit(monkeypatch, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfa red\r\n\n  \nb blue\rc\n\n")
    options = sample_command.Options(prompts=file)
    assert sample_command._prompts(options) == ["a red", "b blue", "c"]
    monkeypatch.setattr(sample_command, "MOST_PROMPT_BYTES", 8)
    with pytest.raises(UserError, match="p.txt: must have at most 8 bytes"):
        sample_command._prompts(options)


def test_the_grid_shows_the_first_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(runner.Cascade, "load", lambda *a, **k: testing.cascade())
    monkeypatch.setattr(output, "MOST_IN_GRID", 2)
    shown = []
    monkeypatch.setattr("cascade.images.grid", lambda them: shown.extend(them) or them[0])
    words = ["red", "--num", "3", "--until", "8", "--out", str(tmp_path), "--no-compilation-cache"]
    sample_command.main(words)
    assert len(shown) == 2
