"""`cascade eval compare` and `preference`: pairs and sides against what was drawn, blindness by the
bytes of the page, statistics against closed forms, scipy and simulations."""

import base64
import collections
import hashlib
import io
import json
import re

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from study_runs import SECRETS, run_of, write_run

from cascade import cli
from cascade.commands import eval as evaluate
from cascade.commands.eval import people
from cascade.errors import UserError
from cascade.evaluation import preference, study
from cascade.evaluation.preference import Answer, Key, KeyPair

PROMPTS = [f"thing {i} on a shelf" for i in range(12)]
CATEGORIES = ["Colors", "Counting", "Positions"]


@pytest.fixture
def runs(tmp_path):
    """Two runs of the same prompts, of three categories, at 8 and 16 px."""
    of = [CATEGORIES[i % 3] for i in range(len(PROMPTS))]
    return [
        write_run(tmp_path / f"run-{run}", run, PROMPTS, sides=(8, 16), categories=of)
        for run in "ab"
    ]


def compared(runs, page, **options):
    said = people.compare(people.CompareOptions(run_a=runs[0], run_b=runs[1], out=page, **options))
    return said, json.loads(page.with_suffix(".key.json").read_text())


def shown(page):
    """The pairs in the page's source: [{"pair", "prompt", "left", "right"}], pictures decoded."""
    data = re.search(r'<script type="application/json" id="study">(.*?)</script>', page, re.S)[1]
    pairs = json.loads(data)["pairs"]
    for pair in pairs:
        for side in ("left", "right"):
            png = base64.b64decode(pair[side].removeprefix("data:image/png;base64,"))
            pair[side] = Image.open(io.BytesIO(png))
    return pairs


# Which pictures stand beside each other.


def test_pictures_are_paired_by_prompt_and_by_their_order_among_those_of_one_prompt(tmp_path):
    a = study.read_run(write_run(tmp_path / "a", "a", ["x", "y", "x", "only a", "z", "z"]))
    b = study.read_run(write_run(tmp_path / "b", "b", ["z", "x", "b 1", "b 2", "x", "x", "y"]))
    pairs, left_out = study.pair_up(a, b, ("a", "b"))
    found = {(p.prompt, p.a.about.stem, p.b.about.stem) for p in pairs}
    numbers = {("x", 0, 1), ("x", 2, 4), ("y", 1, 6), ("z", 4, 0)}
    assert found == {(prompt, f"{i:04d}", f"{j:04d}") for prompt, i, j in numbers}
    assert left_out == study.LeftOut(prompts_of_a=1, prompts_of_b=2, pictures=2)


def test_the_key_tells_which_run_drew_what_the_page_shows(runs, tmp_path):
    said, key = compared(runs, tmp_path / "page.html")
    pairs = shown((tmp_path / "page.html").read_text())
    assert [p["pair"] for p in pairs] == [p["pair"] for p in key["pairs"]] == list(range(1, 13))
    for pair, known in zip(pairs, key["pairs"], strict=True):
        right = {"a": "b", "b": "a"}[known["left"]]
        number = PROMPTS.index(pair["prompt"])
        assert run_of(pair["left"]) == (known["left"], number)
        assert run_of(pair["right"]) == (right, number)
        assert known["prompt"] == pair["prompt"] and known["category"] == CATEGORIES[number % 3]
        assert known["a"] == known["b"] == f"{number:04d}_16.png"
    assert key["runs"] == {"a": str(runs[0]), "b": str(runs[1])}
    assert said["categories"] == dict.fromkeys(CATEGORIES, 4) and said["side"] == 16
    assert (
        said["study"] == key["study"] and said["bytes"] == (tmp_path / "page.html").stat().st_size
    )


def test_what_one_run_alone_has_is_left_out_and_told(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "one", "a", ["x", "y", "y"]),
        write_run(tmp_path / "two", "b", ["y", "z", "w"]),
    ]
    said, _ = compared(runs, tmp_path / "page.html")
    assert said["pairs"] == 1
    assert said["left_out"] == {"prompts_of_a": 1, "prompts_of_b": 2, "pictures": 1}
    told = capsys.readouterr().err
    assert f"left out: 1 prompts that only {runs[0]} has" in told
    assert f"left out: 2 prompts that only {runs[1]} has" in told
    assert "left out: 1 pictures of which the other run has none of the same prompt" in told


# Blindness.


def chunks(png):
    """The names of a PNG's chunks, read by hand."""
    names, at = [], 8
    while at < len(png):
        names.append(png[at + 4 : at + 8])
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return names


def test_the_page_holds_the_pixels_and_nothing_that_tells_whose_they_are(runs, tmp_path):
    page = tmp_path / "page.html"
    _, key = compared(runs, page, seed=31337)
    source = page.read_text()
    told = [*SECRETS, "run-a", "run-b", str(tmp_path), "4242", "31337", "category", "_16"]
    pictures = [base64.b64decode(d) for d in re.findall(r"image/png;base64,([^\"]+)", source)]
    assert len(pictures) == 24
    for word in (*told, *CATEGORIES, "0003.json"):
        assert word not in re.sub(r"base64,[^\"]+", "", source)
        assert not any(word.encode() in png for png in pictures)
    for png in pictures:
        assert set(chunks(png)) == {b"IHDR", b"IDAT", b"IEND"}
        run, number = run_of(Image.open(io.BytesIO(png)))
        file = runs["ab".index(run)] / f"{number:04d}_16.png"
        assert b"iTXt" in chunks(file.read_bytes())  # there was something to take away
        assert np.array_equal(Image.open(io.BytesIO(png)), Image.open(file))


def test_the_page_lets_in_no_script_but_its_own_and_asks_no_address(runs, tmp_path):
    page = tmp_path / "page.html"
    compared(runs, page)
    source = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', source)[1]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"] and rules["img-src"] == ["data:"]
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == [f"'sha256-{digest}'"]
    assert "http:" not in source and "https:" not in source and " src=" not in source


def test_a_prompt_cannot_end_the_script_it_stands_in(tmp_path):
    evil = "</script><script>alert(1)</script><!-- \u2028 -"
    runs = [write_run(tmp_path / run, run, [evil]) for run in "ab"]
    compared(runs, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert "alert(1)</script>" not in source
    assert shown(source)[0]["prompt"] == evil


def test_either_run_stands_on_the_left_in_half_of_every_category_and_chance_says_where(runs):
    pairs, _ = study.pair_up(*map(study.read_run, runs), ("a", "b"))
    lefts, orders = collections.Counter(), set()
    for seed in range(200):
        placed = study.places(pairs, seed=seed)
        by_category = collections.Counter((p.pair.category, p.left) for p in placed)
        assert set(by_category.values()) == {2}
        lefts.update(p.pair.prompt for p in placed if p.left == "a")
        orders.add(tuple(p.pair.prompt for p in placed))
    assert len(orders) == 200
    # Of 12 pairs in chance order the first two are of one category in 3 of 11 studies.
    first_two = [{PROMPTS.index(prompt) % 3 for prompt in order[:2]} for order in orders]
    assert 20 < sum(len(found) == 1 for found in first_two) < 90
    # Each is binomial (200, 1/2); the bounds are four standard deviations away.
    assert all(abs(lefts[prompt] - 100) < 4 * 50**0.5 for prompt in PROMPTS)
    assert len(set(lefts.values())) > 1


def test_the_same_command_makes_the_same_study_and_another_seed_another(runs, tmp_path):
    first, key = compared(runs, tmp_path / "1.html")
    again, key_again = compared(runs, tmp_path / "2.html")
    other, other_key = compared(runs, tmp_path / "3.html", seed=1)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    assert key == key_again and first["study"] == again["study"] != other["study"]
    sides = [{p["prompt"]: p["left"] for p in k["pairs"]} for k in (key, other_key)]
    assert sides[0] != sides[1]


def test_the_sides_of_one_study_tell_nothing_of_those_of_another_with_the_same_seed(tmp_path):
    """A rater who has seen the key of one study cannot guess that of the next."""
    sides = []
    for name in ("first", "second"):
        folders = [write_run(tmp_path / f"{name}-{run}", run, PROMPTS) for run in "ab"]
        record = folders[0] / "0000.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "note": name}))
        pairs, _ = study.pair_up(*map(study.read_run, folders), ("a", "b"))
        sides.append([(p.pair.prompt, p.left) for p in study.places(pairs, seed=0)])
    assert sides[0] != sides[1] and sorted(sides[0]) != sorted(sides[1])


# A part of the pairs.


def test_a_part_is_of_all_categories_alike_and_of_as_many_prompts_as_can_be(tmp_path):
    names = ["many"] * 20 + ["few"] * 2 + ["some"] * 6
    prompts = [f"prompt {i // 2}" for i in range(28)]  # two pictures of each
    folders = [write_run(tmp_path / r, r, prompts, categories=names) for r in "ab"]
    pairs, _ = study.pair_up(*map(study.read_run, folders), ("a", "b"))
    for count, expected in (
        (9, {"many": (3, 4), "few": (2, 2), "some": (3, 4)}),
        (3, {"many": (1, 1), "few": (1, 1), "some": (1, 1)}),
        (26, {"many": (18, 18), "few": (2, 2), "some": (6, 6)}),
    ):
        placed = study.places(pairs, seed=3, count=count)
        found = collections.Counter(p.pair.category for p in placed)
        assert sum(found.values()) == count
        assert all(low <= found[name] <= high for name, (low, high) in expected.items())
        of_many = [p.pair.prompt for p in placed if p.pair.category == "many"]
        assert len(set(of_many)) == min(10, len(of_many))
    chosen = [{p.pair.a.about for p in study.places(pairs, seed=s, count=9)} for s in (0, 1)]
    assert chosen[0] != chosen[1]


# Mistakes.


def test_mistakes_in_runs_are_told_in_a_line_and_leave_nothing(runs, tmp_path):
    other = write_run(tmp_path / "other", "b", ["a stranger"])
    tall = write_run(tmp_path / "tall", "b", PROMPTS, sides=(16,), shape=(16, 8))
    larger = write_run(tmp_path / "larger", "b", PROMPTS, sides=(32,))
    unlike = write_run(tmp_path / "unlike", "b", PROMPTS, categories=["Positions"] * 12)
    wordless = write_run(tmp_path / "wordless", "b", PROMPTS)
    (wordless / "0002.json").write_text('{"prompt": 3}')
    broken = write_run(tmp_path / "broken", "b", PROMPTS, sides=(16,))
    (broken / "0002_16.png").write_bytes(b"none")
    (tmp_path / "empty").mkdir()
    linked = write_run(tmp_path / "linked", "b", PROMPTS)
    (linked / "0001_16.png").symlink_to(runs[1] / "0001_16.png")
    before = sorted(tmp_path.rglob("*"))
    for second, options, told in (
        (other, {}, r"run-a and .*other: have no prompt in common; .*'thing 0.*'a stranger'"),
        (tall, {}, r"0000?.*16\.png has 16 x 16 pixels, .*16\.png 8 x 16: pictures of different"),
        (
            larger,
            {},
            r"larger/0000\.json: is there at 32 px, .*json at 8, 16 px, and no side is co",
        ),
        (larger, {"side": 32}, r"--side 32: .*run-a/0000\.json is there at 8, 16 px only; no side"),
        (runs[1], {"side": 12}, r"--side 12: .* is there at 8, 16 px only; all pictures have 8, 1"),
        (unlike, {}, r"0000\.json: one prompt, but of the categories 'Colors' and 'Positions'"),
        (wordless, {}, r'0002\.json: has no "prompt" with a text'),
        (broken, {}, r"picture .*0002_16\.png: cannot be read as an image"),
        (linked, {}, r"0001_16\.png: is a link that leads outside the folder"),
        (tmp_path / "empty", {}, r"run .*empty: holds no picture of `cascade sample`"),
        (tmp_path / "none", {}, r"run .*none: no such folder"),
        (runs[1], {"pairs": 13}, r"--pairs 13: the two runs have 12 pairs in common"),
        (runs[1], {"pairs": 0}, r"--pairs must be 1 or more, got 0"),
        (runs[1], {"seed": -1}, r"--seed must be in \[0, 2\^32 - 1\], got -1"),
        (runs[1], {"key": runs[0] / "0000.json"}, r"--key .*0000\.json: must be a new file"),
        (runs[1], {"key": tmp_path / "new" / "p.html"}, r"--key .*p\.html: must be a new file"),
    ):
        with pytest.raises(UserError, match=told):
            compared((runs[0], second), tmp_path / "new" / "p.html", **options)
    with pytest.raises(UserError, match=r"--out .*page: must be a new file whose name ends in"):
        compared(runs, tmp_path / "page")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_would_be_too_large_is_refused_with_what_would_fit(runs, tmp_path, monkeypatch):
    said, _ = compared(runs, tmp_path / "all.html")
    monkeypatch.setattr(study, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="more than 0 MB: 5 of 12 pairs at 16 px are as mu") as e:
        compared(runs, tmp_path / "new" / "page.html")
    assert "give --pairs 4 or --side 8" in str(e.value) and not (tmp_path / "new").exists()
    compared(runs, tmp_path / "new" / "page.html", pairs=4)


# Win rates.


def key_of(pairs, categories=None, prompts=None):
    """A key of so many pairs, the left one A's in every other."""
    return Key(
        study="s",
        runs=("one", "two"),
        pairs={
            i: KeyPair(
                prompt=prompts[i - 1] if prompts else f"p{i}",
                category=categories[i - 1] if categories else None,
                left="ab"[i % 2],
            )
            for i in range(1, pairs + 1)
        },
    )


def said_of(pair, preferred, rater="r"):
    return Answer(rater=rater, pair=pair, preferred={"quality": preferred, "text": "same"})


def test_with_one_rater_the_intervals_of_shares_are_wilsons():
    words = ["a"] * 13 + ["same"] * 4 + ["b"] * 20
    answers = [said_of(i, word) for i, word in enumerate(words, 1)]
    found = preference.figures(key_of(37), answers, "quality")
    for name, count in (("a", 13), ("same", 4), ("b", 20)):
        interval = scipy.stats.binomtest(count, 37).proportion_ci(0.95, method="wilson")
        assert found[name]["answers"] == count
        assert found[name]["share"] == pytest.approx(count / 37, abs=1e-4)
        assert found[name]["interval"] == pytest.approx([interval.low, interval.high], abs=1e-4)
    assert found["win_rate_a"]["share"] == pytest.approx((13 + 4 / 2) / 37, abs=1e-4)
    low, high = found["win_rate_a"]["interval"]
    assert low < found["win_rate_a"]["share"] < high


def test_figures_of_a_study_counted_by_hand():
    """Pairs 1 and 2 are of one prompt; pair 1 has two raters. A is on the left in even pairs."""
    key = key_of(4, ["x", "x", "y", None], ["p", "p", "q", "r"])
    answers = [
        *(said_of(1, "a"), said_of(1, "same", "other"), said_of(2, "a"), said_of(3, "b")),
        said_of(3, "b", "other"),
    ]
    found = preference.report(key, answers)
    assert found["raters"] == {"r": 3, "other": 2} and found["pairs"] == {"answered": 3, "of": 4}
    quality = found["questions"]["quality"]
    overall = quality["overall"]
    assert [overall[name] for name in ("prompts", "pairs", "answers")] == [2, 3, 5]
    # Of prompt p, A has 2 of 3 answers and neither has 1; of q, B has both.
    assert overall["a"]["share"] == pytest.approx(1 / 3, abs=1e-4)
    assert overall["same"]["share"] == pytest.approx(1 / 6, abs=1e-4)
    assert overall["b"]["share"] == pytest.approx(1 / 2)
    assert overall["win_rate_a"]["share"] == pytest.approx((2.5 / 3 + 0) / 2, abs=1e-4)
    assert quality["categories"]["y"]["b"]["share"] == 1
    assert quality["categories"]["x"]["a"]["share"] == pytest.approx(2 / 3, abs=1e-4)
    assert "(none)" not in quality["categories"]
    # Two couples, of which that of pair 3 agrees; 2 a, 1 same, 2 b among five.
    assert quality["agreement"] == {"share": 0.5, "couples": 2, "chance": (4 + 1 + 4) / 25}
    assert preference.report(key_of(1), [said_of(1, "a")])["questions"]["text"] == {
        "overall": preference.figures(key_of(1), [said_of(1, "a")], "text"),
        "categories": {},
        "agreement": None,
    }


def test_raters_who_all_say_the_same_add_nothing_to_what_one_says():
    words = ["a"] * 13 + ["b"] * 20
    one = [said_of(i, word) for i, word in enumerate(words, 1)]
    five = [said_of(a.pair, a.preferred["quality"], f"r{k}") for a in one for k in range(5)]
    key = key_of(33)
    for name in ("a", "b", "win_rate_a"):
        alone, together = (preference.figures(key, v, "quality")[name] for v in (one, five))
        assert together["interval"] == alone["interval"]
    assert preference.mean_and_interval([[1.0] * 9] * 4) == preference.mean_and_interval(
        [[1.0]] * 4
    )
    assert preference.mean_and_interval([[1.0] * 9] * 4)[1][0] < 0.6


def test_the_interval_is_as_wide_as_a_bootstrap_over_prompts_makes_it():
    rng = np.random.default_rng(0)
    groups = [rng.binomial(1, rng.beta(2, 1.5), size=4).astype(float).tolist() for _ in range(150)]
    means = np.array([np.mean(g) for g in groups])
    drawn = means[rng.integers(150, size=(5000, 150))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value, interval = preference.mean_and_interval(groups)
    assert value == pytest.approx(means.mean())
    assert interval == pytest.approx((low, high), abs=0.006)


@pytest.mark.parametrize("raters", [1, 4])
def test_intervals_hold_the_truth_as_often_as_they_say(raters):
    """Raters of a pair are alike: what they prefer depends on the pair. Ties are half."""
    rng, held, neglecting, times = np.random.default_rng(raters), 0, 0, 1000
    truth = 2 / 3  # of beta(1, 0.5)
    for _ in range(times):
        wins = rng.beta(1.0, 0.5, size=40)
        scores = (rng.random((40, raters)) < wins[:, None]).astype(float)
        scores[rng.random(40) < 0.2] = 0.5  # pairs that look alike
        expected = 0.8 * truth + 0.2 * 0.5
        _, (low, high) = preference.mean_and_interval(scores.tolist())
        held += low <= expected <= high
        _, (low, high) = preference.mean_and_interval(scores.reshape(-1, 1).tolist())
        neglecting += low <= expected <= high
    assert 0.935 < held / times < 0.985
    if raters > 1:
        assert neglecting / times < 0.9  # as if all answers were independent


def test_names_of_anybody_are_shown_as_they_are_and_do_nothing(tmp_path, monkeypatch):
    """Formulas that matplotlib cannot parse, letters that no encoding has, a terminal's commands,
    and more categories than a figure has room for."""
    names = [r"$\frac$", "\ud800", "\x1b[2J", *(f"category {i:03}" for i in range(20))]
    monkeypatch.setattr(preference, "MOST_BARS", 5)
    key = key_of(len(names), names)
    found = preference.report(key, [said_of(i, "a") for i in range(1, len(names) + 1)])
    found["runs"] = {"a": "$_$", "b": "\x1b[31m" + "long/" * 40}
    preference.plot(tmp_path / "plot.png", found)
    told = preference.table(found)
    assert "\x1b" not in told and r"\x1b[2J" in told and r"\ud800" in told


# Answers.


def files_of(tmp_path, *contents):
    files = []
    for i, content in enumerate(contents):
        files.append(tmp_path / f"answers-{i}.json")
        files[-1].write_text(content if isinstance(content, str) else json.dumps(content))
    return files


def answers_of(*pairs, study="s", rater="ann"):
    return {
        "study": study,
        "rater": rater,
        "answers": [{"pair": p, "quality": q, "text": t} for p, q, t in pairs],
    }


def test_left_and_right_become_the_runs_that_stood_there(tmp_path):
    files = files_of(tmp_path, answers_of((1, "left", "right"), (2, "left", "same")))
    found = preference.read_answers(files, key_of(2))  # A is on the left of pair 2
    assert [one.preferred for one in found] == [
        {"quality": "b", "text": "a"},
        {"quality": "a", "text": "same"},
    ]


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (["{"], r"answers-0\.json: not readable as JSON"),
        (["[]"], r"answers-0\.json: is no file of answers"),
        ([{"study": "s"}], r"answers-0\.json: is no file of answers"),
        ([answers_of(study="t")], r"answers the study 't', and the key is that of 's'"),
        ([answers_of(rater=" ")], r'"rater" must be a name, got \' \''),
        ([answers_of((3, "left", "left"))], r"pair 3 is none of the study's, which are 1 to 2"),
        ([answers_of((True, "left", "left"))], r"pair True is none of the study's"),
        ([answers_of(("1", "left", "left"))], r"pair '1' is none of the study's"),
        ([{**answers_of(), "answers": [3]}], r"pair None is none of the study's"),
        ([answers_of((1, "Left", "same"))], r'pair 1: "quality" must be one of left, right, same'),
        ([answers_of((1, "left", ["same"]))], r"\"text\" must be one of .*, got \['same'\]"),
        ([answers_of(*[(1, "left", "left")] * 2)], r"'ann' has answered pair 1 twice in it; give"),
        (
            [answers_of((1, "left", "left")), answers_of((1, "same", "left"), rater="Ann ")],
            r"answers-1\.json: 'Ann' has answered pair 1 in .*answers-0\.json too",
        ),
        ([answers_of()], r"the answers are empty"),
    ],
)
def test_answers_that_cannot_be_counted_are_refused(tmp_path, contents, told):
    with pytest.raises(UserError, match=told):
        preference.read_answers(files_of(tmp_path, *contents), key_of(2))


@pytest.mark.parametrize("spoil", [{"pairs": []}, {"pairs": [{}]}, {"runs": 3}, {"study": None}])
def test_a_file_that_is_no_key_is_refused(runs, tmp_path, spoil):
    _, key = compared(runs, tmp_path / "page.html")
    assert preference.read_key(tmp_path / "page.key.json").study == key["study"]
    (tmp_path / "bad.json").write_text(json.dumps({**key, **spoil}))
    with pytest.raises(UserError, match=r"--key .*bad\.json: is no key of a study; give the file"):
        preference.read_key(tmp_path / "bad.json")


def test_from_two_folders_to_win_rates_on_the_command_line(runs, tmp_path, capsys):
    """Ann finds A's pictures better whatever the side; Bob always says left for the text."""
    page, out = tmp_path / "study.html", tmp_path / "results"
    evaluate.main(["compare", *map(str, runs), "--out", str(page), "--pairs", "6", "--seed", "5"])
    said = json.loads(capsys.readouterr().out)
    assert said["pairs"] == 6 and said["categories"] == dict.fromkeys(CATEGORIES, 2)
    pairs = shown(page.read_text())
    better = ["left" if run_of(p["left"])[0] == "a" else "right" for p in pairs]
    files = files_of(
        tmp_path,
        answers_of(*((i, b, b) for i, b in enumerate(better, 1)), study=said["study"]),
        answers_of(*((i, "same", "left") for i in range(1, 7)), study=said["study"], rater="bob"),
    )
    evaluate.main(["preference", *map(str, files), "--key", said["key"], "--out", str(out)])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    quality, text = (found["questions"][q]["overall"] for q in ("quality", "text"))
    assert quality["win_rate_a"]["share"] == 0.75 and quality["same"]["share"] == 0.5
    assert text["win_rate_a"]["share"] == 0.75  # 1 of Ann, a half of Bob, as sides are balanced
    assert found["questions"]["quality"]["agreement"]["share"] == 0
    assert found["questions"]["text"]["agreement"]["share"] == 0.5
    assert f"A is {runs[0]}" in printed.err and "A wins 75.0%" in printed.err
    assert json.loads((out / "results.json").read_text()) == found
    with Image.open(out / "preference.png") as picture:
        assert picture.width > 1000
    with pytest.raises(SystemExit) as e:
        cli.main(["eval", "preference", str(files[0]), str(files[0]), "--key", said["key"]])
    assert e.value.code == 2 and "error: answers " in capsys.readouterr().err
