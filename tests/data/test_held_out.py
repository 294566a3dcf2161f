"""What is held out is never trained on, whatever becomes of the rest of the dataset."""

import itertools

import numpy as np
import pytest
from written import WRITERS, pairs, records, tar

from cascade.data import Filters, Mixture, TarData, batches
from cascade.data.held_out import divided
from cascade.data.source import hashes_of
from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData


def captions(source):
    return [source[i]["caption"] for i in range(len(source))]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_example_is_in_one_part(kind, tmp_path):
    source = WRITERS[kind](tmp_path / "d", records(12)).open(8)
    trained, held_out = divided(source, 0.4)
    assert sorted(captions(trained) + captions(held_out), key=int) == [str(i) for i in range(12)]
    assert len(trained) and len(held_out)


def test_it_stays_the_same_when_examples_come_or_go_or_shards_are_cut_anew(tmp_path):
    def held(data):
        return set(captions(divided(data.open(8), 0.4)[1]))

    whole = tar(tmp_path / "a", records(20), per_shard=4)
    out = held(whole)
    assert held(tar(tmp_path / "b", records(20), per_shard=7)) == out
    assert held(tar(tmp_path / "c", records(20)[5:])) == {c for c in out if int(c) >= 5}
    some = TarData(path=whole.path, filters=Filters(columns=("number >= 5",)))
    assert held(some) == {c for c in out if int(c) >= 5}


def test_about_that_share_is_held_out():
    hashes = hashes_of(f"{i:09d}" for i in range(20_000))
    assert abs(np.mean(hashes < 0.1 * 2**32) - 0.1) < 0.01


def test_batches_of_the_rest_never_show_what_is_held_out(tmp_path):
    trained, held_out = divided(pairs(tmp_path, records(12)).open(8), 0.4)
    shown = batches(trained, batch_size=4, seed=0, tokenizer=None)
    seen = {int(x[0, 0, 0]) // 10 for b in itertools.islice(shown, 20) for x in b["image"]}
    shown.close()
    assert seen == set(map(int, captions(trained))) and not seen & set(map(int, captions(held_out)))


def test_a_mixture_keeps_its_weights_without_what_is_held_out(tmp_path):
    parts = pairs(tmp_path / "a", records(20)[:10]), tar(tmp_path / "b", records(20)[10:])
    trained, _ = divided(Mixture(sources=parts, weights=(3.0, 1.0)).open(8), 0.4)
    shown = batches(trained, batch_size=8, seed=0, tokenizer=None)
    seen = [int(x[0, 0, 0]) // 10 for b in itertools.islice(shown, 5) for x in b["image"]]
    shown.close()
    assert sum(number < 10 for number in seen) == 30


def test_parts_of_nothing_and_endless_data_are_refused(tmp_path):
    source = pairs(tmp_path, records(3)).open(8)
    with pytest.raises(UserError, match="of 3 examples 0 would be held out"):
        divided(source, 1e-6)
    with pytest.raises(UserError, match="1000000000 examples is too large to divide"):
        divided(ScenesData().open(8), 0.1)
