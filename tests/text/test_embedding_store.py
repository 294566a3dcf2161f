"""Stores of embeddings: what is read is what was written, and what is damaged is told."""

import dataclasses
import hashlib
import json
import pickle
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cascade import testing
from cascade.errors import UserError
from cascade.storage import checksums
from cascade.text import store, store_making
from cascade.text.store import Making, StoreConfig, open_store
from cascade.text.tokenizer import Tokens

WORDS = "red blue green small big circle square star above below".split()
WIDTH, SHARDS = 24, 3


class Ragged:
    """An encoder whose embedding of a token depends on all of its text, and of no other."""

    width, max_tokens = WIDTH, 12

    def __init__(self):
        self.programs, self.texts = set(), 0

    def tokenize(self, texts):
        return testing.FakeEncoder(WIDTH, 12).tokenize([f"{text} ." for text in texts])

    def embed(self, tokens):
        self.programs.add(tokens.ids.shape)
        self.texts += len(tokens.ids)
        return testing.TextEmbedding(
            values=jnp.asarray([*map(of_ids, tokens.ids, tokens.mask)]),
            mask=jnp.asarray(tokens.mask),
        )

    def __call__(self, texts):
        return self.embed(self.tokenize(texts))


def of_ids(ids, mask):
    """[l, d] from the ids of a text: sizes from .01 to 30, one channel ten times the others."""
    rows = [np.random.default_rng([*ids[mask], i]).normal(size=WIDTH) for i in range(len(ids))]
    values = np.stack(rows) * np.geomspace(0.01, 30, 12)[: len(ids), None]
    values[:, 3] *= 10
    return values.astype(np.float32)


def texts_of(n, seed=0):
    rng = random.Random(seed)
    return list({" ".join(rng.choices(WORDS, k=rng.randint(0, 9))): 0 for _ in range(n)})


def made(folder, texts, dtype="int8", shards=SHARDS, encoder=None):
    """A store of these texts, by the parts that a command puts together."""
    encoder = encoder or Ragged()
    gathered = store_making.Gathered(shards, range(shards))
    for text in texts:
        gathered.add(text)
    making = Making(
        texts_digest=gathered.digest,
        text_encoder="ragged",
        encoder_digest="0" * 64,
        text_int8=False,
        captions="verbatim",
        max_tokens=12,
        window=12,
        width=WIDTH,
        dtype=dtype,
        shards=shards,
    )
    folder.mkdir()

    def encode(some):
        return store_making.encoded(encoder, encoder.tokenize(some), 4)

    facts = [
        store_making.make_shard(folder, n, making, gathered.texts[n], encode) for n in range(shards)
    ]
    store_making.finish(folder, store_making.config_of(making, facts, ""), facts)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An int8 store of 40 texts or so."""
    return made(tmp_path_factory.mktemp("stores") / "int8", texts_of(60))


def copied(whole, folder):
    return shutil.copytree(whole, folder / "copy")


# What is written is read


@pytest.mark.parametrize("dtype,most", [("float32", 0), ("bfloat16", 2**-8), ("int8", 0.5)])
def test_embeddings_come_back_as_the_encoder_gives_them_up_to_the_rounding(tmp_path, dtype, most):
    texts = texts_of(50)
    opened = open_store(str(made(tmp_path / "s", texts, dtype)))
    tokens = Ragged().tokenize(texts)
    values, mask = opened.embed(texts, 12)
    np.testing.assert_array_equal(mask, tokens.mask)
    assert not values[~mask].any() and len({m.sum() for m in mask}) > 5
    cosines = []
    for ids, own, m in zip(tokens.ids, values, mask, strict=True):
        true = of_ids(ids, m)[m]
        # Half a step of int8 is 1/254 of a token's largest value; bfloat16 has 8 bits.
        step = np.abs(true).max(1, keepdims=True) / 127 if dtype == "int8" else np.abs(true)
        assert (np.abs(own[m] - true) <= most * step + 1e-6 * np.abs(true)).all()
        size = np.linalg.norm(own[m], axis=1) * np.linalg.norm(true, axis=1)
        cosines += ((own[m] * true).sum(1) / size).tolist()
    assert min(cosines) > 0.999
    assert opened.config.lowest_cosine == pytest.approx(min(cosines), abs=1e-6)


def test_a_text_takes_the_bytes_of_its_own_tokens(whole):
    """Beside hashes, places and headers there is nothing."""
    config = open_store(str(whole)).config
    size = sum((whole / name).stat().st_size for name in store.shard_names(config))
    own = config.tokens * (WIDTH + 4) + config.texts * (16 + 8)
    assert own < size < own + SHARDS * 600
    tokens = Ragged().tokenize(texts_of(60))
    assert config.tokens == tokens.mask.sum() and config.longest == tokens.mask.sum(1).max()


def test_the_files_are_safetensors_that_others_read(whole):
    for number, name in enumerate(store.shard_names(open_store(str(whole)).config)):
        held = safetensors.numpy.load_file(whole / name)
        keys = [bytes(key) for key in held["hashes"]]
        assert keys == sorted(set(keys)) and len(held["offsets"]) == len(keys) + 1
        assert {int.from_bytes(key[:8], "big") * SHARDS // 2**64 for key in keys} == {number}
        for text in texts_of(60):
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if key not in keys:
                continue
            i = keys.index(key)
            part = slice(held["offsets"][i], held["offsets"][i + 1])
            tokens = Ragged().tokenize([text])
            true = of_ids(tokens.ids[0], tokens.mask[0])[tokens.mask[0]]
            own = held["values"][part] * held["scales"][part, None]
            np.testing.assert_allclose(own, true, atol=np.abs(true).max() / 250)


def test_each_text_is_encoded_once_in_batches_of_its_length(tmp_path):
    encoder, texts = Ragged(), texts_of(40)
    again = [*texts, *texts[::-1], *texts]
    folder = made(tmp_path / "s", again, shards=1, encoder=encoder)
    assert open_store(str(folder)).config.texts == len(texts)
    assert len(texts) <= encoder.texts < len(texts) + 2 * 4
    assert encoder.programs == {(4, 8), (4, 12)}


def test_a_store_does_not_depend_on_the_order_of_its_texts(tmp_path, whole):
    other = made(tmp_path / "s", texts_of(60)[::-1])
    files = sorted(p.name for p in whole.iterdir())
    assert files == sorted(p.name for p in other.iterdir())
    assert all((whole / f).read_bytes() == (other / f).read_bytes() for f in files)


def test_a_store_pickles_small_with_no_file_open(whole):
    opened = open_store(str(whole))
    texts = texts_of(60)[:5]
    before = opened.embed(texts, 12)
    pickled = pickle.dumps(opened)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).embed(texts, 12)[0], before[0])


def test_numbers_of_zero_stay_zero_in_int8():
    stored, scales = store.rounded(np.zeros((2, 4), np.float32), "int8")
    assert not stored.any() and not scales.any()
    assert store.lowest_cosine(np.zeros((2, 4), np.float32), stored, scales) == 1


def test_an_embedding_of_no_finite_number_is_refused(tmp_path):
    class Broken(Ragged):
        def embed(self, tokens):
            found = super().embed(tokens)
            return dataclasses.replace(found, values=found.values * jnp.nan)

    with pytest.raises(UserError, match="embeds '.*' as values that are not finite"):
        made(tmp_path / "s", ["red"], encoder=Broken())
    with pytest.raises(UserError, match="no such file|has no config.json"):
        open_store(str(tmp_path / "s"))
    assert not [p for p in (tmp_path / "s").iterdir() if "partial" in p.name]


# What is not there


def test_a_text_that_is_not_there_is_named(whole):
    opened = open_store(str(whole))
    there = texts_of(60)[0]
    assert there in opened and "a purple dog" not in opened
    with pytest.raises(store.Missing, match="have no caption 'a purple dog'; embed all"):
        opened.read([there, "a purple dog"], 12)
    read = opened.read([there, "a purple dog"], 12, others=True)
    assert read["text_found"].tolist() == [True, False] and not read["text"][1].any()
    with pytest.raises(UserError, match="is not UTF-8"):
        opened.read(["a \ud800"], 12)


def test_a_text_longer_than_asked_for_is_told(whole):
    longest = max(texts_of(60), key=lambda text: len(text.split()))
    with pytest.raises(UserError, match="has 10 tokens, and 4 are asked for"):
        open_store(str(whole)).read([longest], 4)


@pytest.mark.parametrize("name,says", [("none", "no such folder"), ("", "has no config.json")])
def test_what_is_no_store_is_told(tmp_path, name, says):
    with pytest.raises(UserError, match=says):
        open_store(str(tmp_path / name))
    (tmp_path / store.UNFINISHED).write_text("{}")
    with pytest.raises(UserError, match="are not whole yet"):
        open_store(str(tmp_path))


# Damage


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_damaged_shard_is_named_by_its_checksum(tmp_path, whole, at):
    folder = copied(whole, tmp_path)
    file = folder / store.shard_name(1)
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match="shard-00001.safetensors is not what was written"):
        open_store(str(folder))
    open_store(str(folder), part=0, parts=2)  # of several processes, another looks at it
    with pytest.raises(UserError, match="shard-00001"):
        open_store(str(folder), part=1, parts=2)
    file.unlink()
    with pytest.raises(UserError, match="shard-00001.safetensors is missing"):
        open_store(str(folder))


def read_all(folder):
    """Without checksums: whoever made the files may have made those too."""
    (folder / checksums.NAME).unlink(missing_ok=True)
    return open_store(str(folder)).read(texts_of(60), 12)


def changed(folder, number=1, **tensors):
    """The shard with those tensors in place of its own, None for none."""
    file = folder / store.shard_name(number)
    held = safetensors.numpy.load_file(file) | tensors
    held = {k: np.ascontiguousarray(v) for k, v in held.items() if v is not None}
    safetensors.numpy.save_file(held, file, {"lowest_cosine": "1.0"})


HOSTILE = {
    "a tensor too few": (lambda h: {"scales": None}, "it holds hashes, offsets, values, not"),
    "a tensor too many": (lambda h: {"more": np.zeros(3, np.int8)}, "it holds "),
    "values of another width": (lambda h: {"values": h["values"][:, 1:]}, "values is int8"),
    "values of another type": (lambda h: {"values": h["values"].astype(np.float32)}, "values is f"),
    "values too few": (lambda h: {"values": h["values"][1:], "scales": h["scales"][1:]}, "offsets"),
    "scales too few": (lambda h: {"scales": h["scales"][1:]}, "scales is float32"),
    "scales of no number": (lambda h: {"scales": h["scales"] * np.nan}, "not a finite number"),
    "scales without end": (lambda h: {"scales": h["scales"] + np.inf}, "not a finite number"),
    "offsets that fall": (lambda h: {"offsets": h["offsets"][::-1]}, "offsets must rise"),
    "offsets far away": (lambda h: {"offsets": h["offsets"] * 2**40}, "offsets must rise"),
    "offsets below 0": (lambda h: {"offsets": h["offsets"] - 5}, "offsets must rise"),
    "a text of no token": (lambda h: {"offsets": h["offsets"] * 0}, "offsets must rise"),
    "one number for all": (lambda h: {"offsets": np.int64(3)}, "offsets"),
    "hashes in no order": (lambda h: {"hashes": h["hashes"][::-1]}, "hashes must rise"),
    "one hash for all": (lambda h: {"hashes": h["hashes"] * 0 + 90}, "hashes must rise"),
    "hashes too short": (lambda h: {"hashes": h["hashes"][:, 1:]}, "hashes is uint8"),
    "hashes of another shard": (lambda h: {"hashes": h["hashes"] // 8}, "hashes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shard_that_is_none_is_refused(tmp_path, whole, name):
    folder = copied(whole, tmp_path)
    change, says = HOSTILE[name]
    changed(folder, **change(safetensors.numpy.load_file(folder / store.shard_name(1))))
    with pytest.raises(UserError, match=says) as e:
        read_all(folder)
    assert "shard-00001.safetensors" in str(e.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_of_no_number_are_refused(tmp_path, dtype):
    folder = made(tmp_path / "s", texts_of(20), dtype)
    held = safetensors.numpy.load_file(folder / store.shard_name(1))
    changed(folder, values=held["values"] * np.array(np.nan, held["values"].dtype))
    with pytest.raises(UserError, match="not a finite number"):
        read_all(folder)


@pytest.mark.parametrize(
    "field,value,says",
    [
        ("shards", 2**40, "shards must be a whole number, 1 to 65536"),
        ("shards", 0, "shards must be"),
        ("width", 10**9, "width must be"),
        ("width", WIDTH + 1, "values is int8"),
        ("max_tokens", 10**12, "max_tokens must be"),
        ("max_tokens", 2, "longest must be a whole number, 0 to 2"),
        ("texts", -1, "texts must be"),
        ("texts", 10**30, "must be below 2"),
        ("lowest_cosine", float("nan"), "must be a finite number"),
        ("dtype", "float64", "must be one of"),
        ("version", 2, "version must be 1"),
        ("type", "os.system", "must be the qualified name of a StoreConfig"),
        ("shard", "../../x", "has no field 'shard'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path, whole, field, value, says):
    folder = copied(whole, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=says):
        read_all(folder)


def test_a_link_out_of_the_store_is_not_followed(tmp_path, whole):
    folder = copied(whole, tmp_path)
    file = folder / store.shard_name(1)
    file.rename(tmp_path / "outside.safetensors")
    file.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="is a link that leads outside of the store"):
        read_all(folder)


def test_random_damage_is_an_error_in_a_line_or_none_at_all(tmp_path, whole):
    rng = random.Random(0)
    for i in range(60):
        folder = shutil.copytree(whole, tmp_path / str(i))
        file = folder / rng.choice(["config.json", store.shard_name(0), store.shard_name(2)])
        content = bytearray(file.read_bytes())
        for _ in range(rng.choice([1, 8])):
            # Headers are at the beginning.
            at = rng.randrange(rng.choice([len(content), min(300, len(content))]))
            content[at] = rng.randrange(256)
        file.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            read_all(folder)
        except UserError as e:
            assert "\n" not in str(e)


def test_tokens_cut_where_the_store_cut_them_read_alike():
    config = StoreConfig(
        texts_digest="",
        text_encoder="",
        encoder_digest="",
        text_int8=False,
        captions="verbatim",
        max_tokens=12,
        window=64,
        width=8,
        dtype="int8",
        shards=1,
        source="",
        texts=1,
        tokens=9,
        longest=9,
        lowest_cosine=1.0,
    )
    assert [n for n in range(1, 65) if config.reads_as(n)] == list(range(9, 65))
    cut = dataclasses.replace(config, longest=12)  # one may have lost its end
    assert [n for n in range(1, 65) if cut.reads_as(n)] == [12]


def test_no_text_is_encoded_where_there_is_none():
    empty = Tokens(ids=np.zeros((0, 12), np.int32), mask=np.zeros((0, 12), bool))
    assert not list(store_making.encoded(Ragged(), empty, 4))
