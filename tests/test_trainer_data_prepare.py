"""Preparing shards: the right tokens and split, equal for any number of workers and cuts, kept when interrupted."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_files import EOS, documents, read_tokens, write_mds, write_tokenizer
from tokenizers import Tokenizer

from trainer.data import encode, prepare, scan
from trainer.data.prepare import PrepareOptions
from trainer.errors import InputError

WORDS = ["some", "small", "text", "to", "learn", "merges", "from", "again", "größer", "\n", "\n\n", "  indented", "x=1"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare, "MIN_PART_BYTES", 1024)


def make_texts(count, seed=0):
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def options(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", make_texts(50, seed)) for seed, name in enumerate("ab")]
    return PrepareOptions(
        inputs=tuple(files), out=str(tmp_path / "out"), tokenizer=str(tokenizer), val_fraction=0.1, shard_tokens=2000
    )


def run(options, **changes):
    return prepare.prepare(replace(options, **changes), quiet=True)


def content(out):
    """Every file of a finished folder but the manifest's `source`, as bytes."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(out))] = path.read_bytes()
    manifest = json.loads(found.pop("manifest.json"))
    manifest.pop("source")
    return found, manifest


def test_every_document_arrives_once_in_order_and_ends_with_eos(options, tokenizer):
    manifest = run(options)
    texts = make_texts(50, 0) + make_texts(50, 1)
    train, val = (documents(options.out, split, tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    for split in (train, val):
        assert split == [text for text in texts if text in set(split)]
    assert 0 < len(val) < 30
    # Against the plain use of the library, one document at a time.
    plain = Tokenizer.from_file(str(tokenizer))
    expected = [i for text in train for i in [*plain.encode(text).ids, 0]]
    assert read_tokens(options.out, "train").tolist() == expected
    assert manifest["dtype"] == "uint16"
    assert (manifest["eos_id"], manifest["source"]["eos"]) == (0, EOS)


def test_the_manifest_is_true(options, tokenizer):
    manifest = run(options)
    out = Path(options.out)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert len(manifest["splits"]["train"]) > 2
    for split, shards in manifest["splits"].items():
        assert [shard["file"] for shard in shards] == [f"{split}/shard-{i:05d}.bin" for i in range(len(shards))]
        for shard in shards:
            data = (out / shard["file"]).read_bytes()
            ids = np.frombuffer(data, "<u2")
            assert shard["tokens"] == len(ids) <= 2000 and shard["bytes"] == len(data)
            assert shard["documents"] == (ids == 0).sum() and shard["max_id"] == ids.max()
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert scan(out, split, 300) == sum(shard["tokens"] for shard in shards)
    assert manifest["tokenizer"]["vocab_size"] == Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    assert (out / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    names = {path.name for path in out.iterdir()}
    assert names == {"train", "val", "manifest.json", "tokenizer.json"}


def test_the_result_does_not_depend_on_the_workers(options, tmp_path):
    run(options)
    run(options, workers=2, out=str(tmp_path / "two"))
    assert content(options.out) == content(tmp_path / "two")


def test_neither_parts_nor_shards_change_the_tokens(options, tmp_path, monkeypatch):
    run(options)
    for number, (part_bytes, shard_tokens) in enumerate([(1 << 20, 2000), (300, 1 << 20), (300, 1)]):
        monkeypatch.setattr(prepare, "MIN_PART_BYTES", part_bytes)
        run(options, out=str(tmp_path / str(number)), shard_tokens=shard_tokens)
        for split in ("train", "val"):
            assert np.array_equal(read_tokens(options.out, split), read_tokens(tmp_path / str(number), split))


def test_the_split_follows_seed_and_content(options, tmp_path, tokenizer):
    texts = make_texts(1000) + make_texts(300)  # 300 duplicates
    inputs = (write_jsonl(tmp_path / "c.jsonl", texts),)
    by_seed = []
    for name, seed in [("x", 1), ("y", 2), ("z", 1)]:
        run(options, inputs=inputs, out=str(tmp_path / name), seed=seed)
        val = documents(tmp_path / name, "val", tokenizer)
        assert not set(val) & set(documents(tmp_path / name, "train", tokenizer))
        assert 60 < len(set(val)) < 140
        by_seed.append(val)
    assert by_seed[0] == by_seed[2] != by_seed[1]
    run(options, inputs=tuple(reversed(options.inputs)), out=str(tmp_path / "r"))
    run(options, out=str(tmp_path / "s"))
    assert set(documents(tmp_path / "r", "val", tokenizer)) == set(documents(tmp_path / "s", "val", tokenizer))


def test_validation_inputs_of_their_own(options, tmp_path, tokenizer):
    val = write_jsonl(tmp_path / "v.jsonl", make_texts(20, 5))
    run(options, val_inputs=(val,), val_fraction=0.0)
    assert documents(options.out, "val", tokenizer) == make_texts(20, 5)
    assert documents(options.out, "train", tokenizer) == make_texts(50, 0) + make_texts(50, 1)


def test_a_document_that_spells_the_eos_stays_one_document(options, tmp_path, tokenizer):
    texts = [f"what {EOS} means", EOS]
    manifest = run(options, inputs=(write_jsonl(tmp_path / "c.jsonl", texts),), val_fraction=0.0)
    assert manifest["splits"]["train"][0]["documents"] == 2
    assert documents(options.out, "train", tokenizer) == texts


@pytest.mark.parametrize("limit", [1, 5, 50, 2000])
def test_long_documents_are_tokenised_as_a_whole(options, tmp_path, tokenizer, monkeypatch, limit):
    texts = ["\n".join(make_texts(30, seed)) for seed in range(3)]
    inputs = (write_jsonl(tmp_path / "c.jsonl", texts),)
    run(options, inputs=inputs, out=str(tmp_path / "whole"), val_fraction=0.0)
    monkeypatch.setattr(encode, "MAX_CHARS", limit)
    monkeypatch.setattr(encode, "BATCH_CHARS", 100)
    run(options, inputs=inputs, val_fraction=0.0)
    whole, cut = (read_tokens(out, "train") for out in (tmp_path / "whole", options.out))
    assert documents(options.out, "train", tokenizer) == texts
    if limit == 2000:  # long enough to hold a newline after a visible character
        assert np.array_equal(whole, cut)


def test_mds_tokens_are_taken_as_they_are(options, tmp_path):
    rows = [[struct.pack("<4i", 5, 6, 0, i)] for i in range(1, 9)]
    folder = write_mds(tmp_path / "m", [rows[:5], rows[5:]], [("tokens", "bytes", None)])
    with pytest.raises(InputError, match=r"shard 0, sample 0: token id 25769803781 is not in 0\.\.\d+.*--mds-dtype"):
        run(options, inputs=(str(folder),))
    options = replace(options, mds_dtype="int32")
    manifest = run(options, inputs=(str(folder),), val_fraction=0.0)
    assert read_tokens(options.out, "train").tolist() == [x for i in range(1, 9) for x in (5, 6, 0, i)]
    assert manifest["splits"]["train"][0]["documents"] == 8
    run(options, inputs=(str(folder),), val_fraction=0.5, overwrite=True)
    both = np.concatenate([read_tokens(options.out, split) for split in ("train", "val")]).reshape(8, 4)
    assert sorted(both[:, 3]) == list(range(1, 9))


# Interruptions


class Interrupted(Exception):
    pass


def count(monkeypatch, name, fail_at=None):
    """Counts the calls of prepare.<name>, and raises at call number `fail_at` (from 0), before or after its work."""
    calls = []
    real = getattr(prepare, name)

    def wrapper(job):
        calls.append(job)
        if fail_at is not None and len(calls) - 1 == fail_at:
            raise Interrupted
        return real(job)

    monkeypatch.setattr(prepare, name, wrapper)
    return calls


@pytest.mark.parametrize("stage", ["_tokenise", "_join_parts"])
@pytest.mark.parametrize("fail_at", [0, 2])
def test_an_interrupted_run_goes_on(options, tmp_path, stage, fail_at):
    with pytest.MonkeyPatch.context() as patch:
        everything = count(patch, stage)
        run(options, out=str(tmp_path / "reference"))
    with pytest.MonkeyPatch.context() as patch:
        count(patch, stage, fail_at)
        with pytest.raises(Interrupted):
            run(options)
    assert not (Path(options.out) / "manifest.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        tokenised, again = count(patch, "_tokenise"), count(patch, stage)
        run(options)
    assert len(again) == len(everything) - fail_at > 2
    if stage == "_join_parts":
        assert not tokenised
    assert content(options.out) == content(tmp_path / "reference")


def test_a_damaged_part_is_made_again(options, tmp_path, monkeypatch):
    run(options, out=str(tmp_path / "reference"))
    with pytest.MonkeyPatch.context() as patch:
        count(patch, "_join_parts", 0)
        with pytest.raises(Interrupted):
            run(options)
    state = Path(options.out) / ".prepare"
    os.truncate(state / "part-00000-train.bin", 2)
    (state / "part-00001.json").write_text("{")
    calls = count(monkeypatch, "_tokenise")
    run(options)
    assert [part.number for part in calls] == [0, 1]
    assert content(options.out) == content(tmp_path / "reference")


@pytest.mark.parametrize("stage", ["_tokenise", "_join_parts"])
def test_changed_inputs_and_options_are_made_anew(options, tmp_path, stage):
    with pytest.MonkeyPatch.context() as patch:
        count(patch, stage, 2)
        with pytest.raises(Interrupted):
            run(options)
    texts = make_texts(50, 1)
    texts[0] += " and more"
    write_jsonl(tmp_path / "b.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        some = count(patch, "_tokenise")
        run(options)
    run(options, out=str(tmp_path / "reference"))
    assert content(options.out) == content(tmp_path / "reference")
    if stage == "_tokenise":
        assert {Path(piece.path).name for part in some for piece in part.pieces} >= {"b.jsonl"}
        assert 0 not in [part.number for part in some]


def test_a_finished_folder_is_left_alone(options, monkeypatch):
    first = run(options)
    calls = count(monkeypatch, "_tokenise")
    assert run(options, workers=4) == first
    assert not calls
    with pytest.raises(InputError, match=r"other inputs or with other options; choose another --out.*--overwrite"):
        run(options, seed=3)
    with pytest.raises(InputError, match="other inputs"):
        run(options, inputs=options.inputs[:1])
    assert run(options) == first


def test_overwrite_replaces_what_was_there(options, tmp_path):
    run(options)
    run(options, inputs=options.inputs[:1], overwrite=True)
    run(options, inputs=options.inputs[:1], out=str(tmp_path / "reference"))
    assert content(options.out) == content(tmp_path / "reference")


def test_a_damaged_finished_folder(options, tmp_path):
    run(options, out=str(tmp_path / "reference"))
    run(options)
    (Path(options.out) / "train/shard-00001.bin").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.bin.*--overwrite"):
        run(options)
    run(options, overwrite=True)
    assert content(options.out) == content(tmp_path / "reference")


@pytest.mark.parametrize("name", ["train/shard-00007.bin", "val/shard-00000.bin", "tokenizer.json"])
def test_files_of_something_else_are_not_replaced(options, name):
    foreign = Path(options.out) / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("not ours")
    with pytest.raises(InputError, match=rf"--out .*out: holds {name} of something else; choose .*--overwrite"):
        run(options)
    assert [p for p in Path(options.out).rglob("*") if p.is_file()] == [foreign]
    assert foreign.read_text() == "not ours"
    run(options, overwrite=True)


def test_the_tokenizer_may_lie_in_the_output_folder(options, tmp_path):
    run(options, out=str(tmp_path / "reference"))
    Path(options.out).mkdir()
    inside = Path(shutil.copy(options.tokenizer, options.out))
    run(options, tokenizer=str(inside))
    assert content(options.out) == content(tmp_path / "reference")
    again = tmp_path / "equal"
    again.mkdir()
    shutil.copy(options.tokenizer, again)
    run(options, out=str(again))


def test_two_preparations_of_one_folder(options):
    Path(options.out).mkdir()
    folder = os.open(options.out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another preparation"):
        run(options)
    os.close(folder)
    run(options)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 1.0}, r"--val-fraction 1\.0"),
        ({"val_fraction": -0.1}, r"--val-fraction -0\.1"),
        ({"workers": 0}, "--workers 0"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"seed": -1}, "--seed -1"),
        ({"inputs": ("nothing.jsonl",)}, r"nothing\.jsonl: no such file"),
        ({"inputs": ("tests/nothing",)}, r"tests/nothing: no such file"),
        ({"inputs": ("s3://bucket/a.jsonl",)}, r"s3://bucket/a\.jsonl: remote"),
        ({"out": "gs://bucket/out"}, r"gs://bucket/out: remote"),
        ({"out": "/dev/null/out"}, r"--out /dev/null/out: cannot be made \(Not a directory\)"),
        ({"tokenizer": "nothing.json"}, r"tokenizer nothing\.json: no such file"),
        ({"eos": "<none>"}, "--eos <none>"),
        ({"text_field": "body"}, r"a\.jsonl, line 1: no field 'body'"),
        ({"val_fraction": 1 - 1e-12}, "no document for training"),
    ],
)
def test_bad_options_are_named(options, changes, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)  # where there is a folder tests
    with pytest.raises(InputError, match=message):
        run(options, **changes)


def test_the_shards_do_not_go_into_an_input(options, tmp_path):
    with pytest.raises(InputError, match="lies inside the input folder"):
        run(options, inputs=(str(tmp_path),))


def test_a_bad_line_in_a_worker_process_is_named(options, tmp_path):
    lines = Path(options.inputs[1]).read_text().splitlines()
    lines[30] = "{"
    Path(options.inputs[1]).write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"b\.jsonl, line 31: not JSON"):
        run(options, workers=2)


def test_dtypes(options, tmp_path, tokenizer):
    manifest = run(options, dtype="uint32")
    assert manifest["dtype"] == "uint32"
    assert scan(options.out, "train", 300) > 0
    large = tmp_path / "large" / "tokenizer.json"
    large.parent.mkdir()
    data = json.loads(tokenizer.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "content": "<far>", "id": 70_000})
    large.write_text(json.dumps(data))
    data["model"]["vocab"]["<far>"] = 70_000
    large.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"--dtype uint16: the tokenizer's largest id is 70000"):
        run(options, tokenizer=str(large), dtype="uint16", out=str(tmp_path / "x"))
    assert run(options, tokenizer=str(large), out=str(tmp_path / "x"))["dtype"] == "uint32"


def test_too_few_documents_for_validation_is_said(options, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("one\n\ntwo")
    prepare.prepare(replace(options, inputs=(str(tmp_path / "one.txt"),), val_fraction=1e-9))
    assert "warning: no document fell into validation; raise --val-fraction 1e-09" in capsys.readouterr().err


def test_what_made_nothing_leaves_nothing(options, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"empty\.txt: no document for training in it; all of it is empty"):
        run(options, inputs=(str(tmp_path / "empty.txt"),))
    assert not Path(options.out).exists()
    with pytest.raises(InputError, match="no field 'body'"):
        run(options, text_field="body")
    assert not Path(options.out).exists()
    manifest = run(options)
    with pytest.raises(InputError, match="no document for training"):
        run(options, inputs=(str(tmp_path / "empty.txt"),), overwrite=True)
    assert run(options) == manifest and not (Path(options.out) / ".prepare").exists()
