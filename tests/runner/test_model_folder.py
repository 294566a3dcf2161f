"""What a model folder says of itself, and what it may not say."""

import pytest
from model_folders import model_folder

from cascade import testing
from cascade.errors import UserError
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model

STAGE = testing.smallest_stage()


def test_how_texts_are_read_is_what_the_folder_says(tmp_path):
    plain = open_model(model_folder(tmp_path / "plain", STAGE))
    assert plain.max_tokens == 128 and plain.captions == "verbatim" and plain.known_words == ()
    assert plain.text_encoder == f"{tmp_path}/plain/text_encoder"
    about = {"max_tokens": 9, "captions": "clean", "known_words": ["a", "b"]}
    told = open_model(model_folder(tmp_path / "told", STAGE, text_encoder="ours/t5", **about))
    assert {name: getattr(told, name) for name in about} == about
    assert told.text_encoder == "ours/t5"


@pytest.mark.parametrize(
    "about,message",
    [
        ({"version": 3}, "version must be 1 to 2, got 3: a later version of this program wrote it"),
        ({"version": "2"}, "version must be 1 to 2, got '2'"),
        ({"format": "other"}, "not a cascade's"),
        ({"stages": ["../outside"]}, "stages must list folder names, got"),
        ({"stages": ["a/b"]}, "stages must list folder names, got"),
        ({"stages": [".."]}, "stages must list folder names, got"),
        ({"stages": [1]}, "stages must list folder names, got"),
        ({"stages": []}, "stages must list folder names, got"),
        ({"stages": "base8"}, "stages must list folder names, got"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
        ({"max_tokens": "32"}, "max_tokens must be 1 or more, got '32'"),
        ({"known_words": "a"}, "known_words must be a list of words, got 'a'"),
        ({"known_words": [["a"]]}, r"known_words must be a list of words, got \[\['a'\]\]"),
    ],
)
def test_a_folder_that_says_what_cannot_be_is_refused(tmp_path, about, message):
    with pytest.raises(UserError, match=message):
        open_model(model_folder(tmp_path / "model", STAGE, **about))


def test_a_folder_without_a_model_does_not_hide_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    assert [stage.resolution for stage in open_model("scenes").stages] == [64, 256, 1024]
    model_folder(tmp_path / "scenes", testing.base_stage())
    assert [stage.resolution for stage in open_model("scenes").stages] == [8]


def test_a_type_that_a_model_does_not_compute_in_is_told(tmp_path):
    folder = model_folder(tmp_path / "own", testing.base_stage(128))
    with pytest.warns(UserWarning, match="bfloat16: is for public weights; .*own computes in"):
        Cascade.load(folder, dtype="bfloat16")
