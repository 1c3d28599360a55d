"""Excerpts of books: cut at the right tokens, none of two documents, and padding that is no label."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_files import edit_manifest, read_tokens, write_mds, write_shards, write_tokenizer
from tokenizers import Tokenizer

from trainer.data import encode, open_loader, prepare, scan
from trainer.data.config import DatasetConfig, LoaderConfig, MixEntry
from trainer.data.prepare import PrepareOptions
from trainer.errors import InputError

N = 32
LENGTHS = [200, 64, 31, 3, 90, 33, 71, 128, 5, 260]  # words, of a token or more each


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_book(number, words):
    rng = random.Random(number)
    return f"book {number}:" + "".join(rng.choice([" a", " small", " text", "\nagain"]) for _ in range(words))


BOOKS = [make_book(number, words) for number, words in enumerate(LENGTHS)]


@pytest.fixture
def options(tmp_path, tokenizer):
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in BOOKS))
    return PrepareOptions(
        inputs=(str(tmp_path / "books.jsonl"),), out=str(tmp_path / "out"), tokenizer=str(tokenizer), val_fraction=0.0,
        excerpt_tokens=N,
    )  # fmt: skip


def expected(tokenizer, rest, least):
    """The excerpts, and how many documents and tokens are left out, cut by hand."""
    plain, found, documents, tokens = Tokenizer.from_file(str(tokenizer)), [], 0, 0
    for book in BOOKS:
        ids = [*plain.encode(book).ids, 0]
        cuts = [ids[i : i + N] for i in range(0, len(ids), N)]
        last = cuts.pop() if len(cuts[-1]) < N else []
        if len(last) >= least and rest == "pad":
            cuts.append(last + [0] * (N - len(last)))
        elif len(last) >= least and rest == "overlap" and cuts:
            cuts.append(ids[-N:])
        else:
            documents, tokens = documents + (not cuts), tokens + len(last)
        found += cuts
    return found, {"documents": documents, "tokens": tokens}


@pytest.mark.parametrize("least", [1, 8, 20])
@pytest.mark.parametrize("rest", ["drop", "overlap", "pad"])
def test_books_are_cut_where_they_should_be(options, tokenizer, monkeypatch, rest, least):
    monkeypatch.setattr(prepare, "MIN_PART_BYTES", 1024)
    monkeypatch.setattr(encode, "MAX_CHARS", 150)  # so that books come in several runs
    manifest = prepare.prepare(replace(options, rest=rest, min_tokens=least, shard_tokens=4 * N), quiet=True)
    excerpts, left_out = expected(tokenizer, rest, max(least, 1) if rest != "drop" else N)
    assert read_tokens(options.out, "train").reshape(-1, N).tolist() == excerpts
    assert manifest["source"]["left_out"] == left_out
    assert (manifest["source"]["rest"], manifest["source"]["min_tokens"]) == (rest, least)
    shards = manifest["splits"]["train"]
    assert manifest["excerpt_tokens"] == N and len(shards) > 1
    assert [shard["tokens"] for shard in shards] == [N * shard["documents"] for shard in shards]
    scan(options.out, "train", 300)
    for row in excerpts:  # the end of a document is the last token, or followed by nothing but filling
        assert 0 not in row or set(row[row.index(0) :]) == {0}


def test_the_result_depends_on_nothing_else(options, tmp_path, monkeypatch):
    prepare.prepare(options, quiet=True)
    monkeypatch.setattr(prepare, "MIN_PART_BYTES", 256)
    prepare.prepare(replace(options, out=str(tmp_path / "two"), workers=2), quiet=True)
    assert np.array_equal(read_tokens(options.out, "train"), read_tokens(tmp_path / "two", "train"))


def test_other_excerpts_are_another_preparation(options, tokenizer, capsys):
    prepare.prepare(options)
    found, left_out = expected(tokenizer, "overlap", 8)
    said = f"{len(found)} excerpts, 1 shards; val 0 tokens, 0 excerpts, 0 shards; left out {left_out['tokens']} tokens"
    assert said in capsys.readouterr().err
    prepare.prepare(options)
    assert "up to date" in capsys.readouterr().err
    for change in ({"excerpt_tokens": 16}, {"rest": "drop"}, {"min_tokens": 3}, {"excerpt_tokens": None}):
        with pytest.raises(InputError, match="with other options"):
            prepare.prepare(replace(options, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"excerpt_tokens": 1}, "--excerpt-tokens 1: give the max_seq_len"),
        ({"min_tokens": 0}, "--min-tokens 0: give 1 to 32"),
        ({"min_tokens": 33}, "--min-tokens 33: give 1 to 32"),
        ({"min_tokens": 3, "excerpt_tokens": None}, "--min-tokens 3 is for excerpts"),
        ({"rest": "pad", "excerpt_tokens": None}, "--rest pad is for excerpts"),
        ({"excerpt_tokens": 10_000, "rest": "pad"}, "10 too short .* 10000; lower it, or --min-tokens 2500$"),
        ({"excerpt_tokens": 10_000}, "no document for training in it; 10 too short for --excerpt-tokens 10000"),
    ],
)
def test_bad_input(options, change, message):
    with pytest.raises(InputError, match=message):
        prepare.prepare(replace(options, **change), quiet=True)


def test_blank_documents_are_not_too_short(options, tmp_path):
    (tmp_path / "books.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(InputError, match="no document for training in it; check --text-field and the files"):
        prepare.prepare(options, quiet=True)


def test_tokens_cannot_be_cut(options, tmp_path):
    write_mds(tmp_path / "mds", [[[np.arange(40, dtype="<i8").tobytes()]]], [("tokens", "bytes", None)])
    with pytest.raises(InputError, match="holds tokens, not texts"):
        prepare.prepare(replace(options, inputs=(str(tmp_path / "mds"),)), quiet=True)


def opened(folder, seq_len, **dataset):
    config = LoaderConfig(dataset=DatasetConfig(local=None if "mix" in dataset else str(folder), **dataset))
    return open_loader(config, seq_len=seq_len, global_batch_size=2, seed=1, vocab_size=300, training=True)


def test_a_sequence_is_an_excerpt_or_an_equal_part_of_one(options):
    prepare.prepare(replace(options, rest="pad", min_tokens=1), quiet=True)
    rows = {tuple(row) for row in read_tokens(options.out, "train").reshape(-1, N).tolist()}
    data = opened(options.out, N)
    assert {tuple(row) for step in range(data.sequences) for row in data.batch(step, [0, 1]).tolist()} == rows
    assert opened(options.out, N // 2).sequences == 2 * data.sequences
    for length in (N - 1, 2 * N):
        with pytest.raises(InputError, match=f"excerpts of 32 tokens, which max_seq_len {length} does not divide"):
            opened(options.out, length)


def test_what_fills_an_excerpt_is_no_label(tmp_path):
    rows = [[5, 6, 7, 8], [5, 6, 0, 0], [5, 0, 0, 0], [5, 6, 7, 0], [0, 0, 0, 0]]
    write_shards(tmp_path / "x", {"train": [[i for row in rows for i in row]]}, vocab_size=300)
    write_shards(tmp_path / "stream", {"train": [[5, 0, 6, 7]]}, vocab_size=300)
    plain = opened(tmp_path / "x", 4)
    ids = np.array(rows)
    assert plain.arguments(ids, sequence_id=False, prefix_mask=False)["labels"] is ids and plain.tokens(ids) == 20
    edit_manifest(tmp_path / "x", lambda manifest: manifest.update(excerpt_tokens=4))
    data = opened(tmp_path / "x", 4)
    labels = data.arguments(ids, sequence_id=False, prefix_mask=False)["labels"].tolist()
    pad = -100
    assert labels == [[5, 6, 7, 8], [5, 6, 0, pad], [5, 0, pad, pad], [5, 6, 7, 0], [0, pad, pad, pad]]
    assert data.tokens(ids) == 14
    # In a mix, a document that ends inside a row of a stream stays as it was.
    mix = [MixEntry(local=str(tmp_path / name)) for name in ("x", "stream")]
    row = np.array([[5, 0, 6, 7]])
    mixed = opened(None, 4, mix=mix).arguments(row, sequence_id=False, prefix_mask=False)
    assert mixed["labels"].tolist() == row.tolist()


@pytest.mark.parametrize("value", [0, "32", True])
def test_a_manifest_with_a_wrong_size(tmp_path, value):
    folder = write_shards(tmp_path, {"train": [[1, 2, 3, 4]]})
    edit_manifest(folder, lambda manifest: manifest.update(excerpt_tokens=value))
    with pytest.raises(InputError, match="excerpt_tokens is"):
        opened(Path(folder), 4)
