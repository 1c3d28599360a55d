"""Opening, checking and scanning token shards: every fault is found, and named with its file, value and remedy."""

import math
import struct

import numpy as np
import pytest
from data_files import edit_manifest, write_shards

from trainer.data.shards import ShardSet, read_manifest, scan, unigram_entropy
from trainer.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "set", {"train": [[5, 6, 0, 7], [8, 9, 0]], "val": [[1, 2, 0]]}, vocab_size=10)


def test_shards_read_back(folder):
    shards = ShardSet(folder, "train")
    assert shards.tokens == 7
    assert [shards.array(i).tolist() for i in range(2)] == [[5, 6, 0, 7], [8, 9, 0]]
    assert shards.array(0).dtype == np.dtype("<u2")
    assert not shards.array(0).flags.writeable
    manifest = read_manifest(folder)
    assert (manifest.eos_id, manifest.vocab_size, sorted(manifest.splits)) == (0, 10, ["train", "val"])


def test_uint32_shards_hold_large_ids(tmp_path):
    folder = write_shards(tmp_path, {"train": [[70_000, 4_000_000_000]]}, dtype="uint32", vocab_size=2**32 - 1)
    assert ShardSet(folder, "train").array(0).tolist() == [70_000, 4_000_000_000]


def test_a_good_set_scans(folder):
    assert scan(folder, "train", 10) == 7
    assert scan(folder, "val", 10, deep=False) == 3


def drop(folder):
    (folder / "train/shard-00001.bin").unlink()


def truncate(folder):
    (folder / "train/shard-00001.bin").write_bytes(b"\x08\0\x09\0")


def lengthen(folder):
    (folder / "train/shard-00001.bin").write_bytes(b"\0" * 8)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(drop, ["cannot be opened"]), (truncate, ["truncated", "4 bytes", "6"]), (lengthen, ["altered", "8 bytes", "6"])],
)
def test_a_damaged_shard_is_named_when_opened(folder, damage, words):
    damage(folder)
    with pytest.raises(InputError) as error:
        ShardSet(folder, "train")
    for word in ["shard-00001.bin", "prepare the data again", *words]:
        assert word in str(error.value)
    ShardSet(folder, "val")


def test_an_altered_byte_is_found_by_the_deep_scan_only(folder):
    (folder / "train/shard-00001.bin").write_bytes(struct.pack("<3H", 8, 9, 1))
    assert scan(folder, "train", 10, deep=False) == 7
    with pytest.raises(InputError, match=r"shard-00001.bin.*SHA-256"):
        scan(folder, "train", 10)


def test_the_deep_scan_names_the_place_of_a_bad_id(folder, monkeypatch):
    monkeypatch.setattr("trainer.data.shards.CHUNK_TOKENS", 2)
    (folder / "train/shard-00000.bin").write_bytes(struct.pack("<4H", 5, 6, 0, 999))
    with pytest.raises(InputError, match=r"shard-00000.bin: token 3 is id 999, vocab_size is 10"):
        scan(folder, "train", 10)


def test_the_manifest_gives_ids_above_the_vocabulary_away(folder):
    with pytest.raises(InputError, match=r"shard-00001.bin: holds token id 9, vocab_size is 9; set .* at least 10"):
        scan(folder, "train", 9, deep=False)


def test_another_tokenizer_is_an_error(folder):
    shards = ShardSet(folder, "train")
    shards.check_tokenizer("0" * 64)
    with pytest.raises(InputError, match=r"SHA-256 000000000000\.\.\..*ffffffffffff.*tokenizer\.json"):
        shards.check_tokenizer("f" * 64)


def set_field(*path, value):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_field("format", value="other"), ["format is 'other'"]),
        (set_field("version", value=2), ["version is 2", "reads version 1"]),
        (set_field("dtype", value="int64"), ["dtype is 'int64'", "uint16, uint32"]),
        (set_field("dtype", value=["uint16"]), ["dtype is ['uint16']", "uint16, uint32"]),
        (set_field("eos_id", value=None), ["eos_id is None"]),
        (set_field("eos_id", value=-1), ["eos_id is -1, expected an id below vocab_size 10"]),
        (set_field("eos_id", value=1000), ["eos_id is 1000"]),
        (set_field("tokenizer", "file", value="a\0b"), ["no file name of this folder"]),
        (set_field("splits", "train", 0, "file", value="a\0b"), ["leaves the folder"]),
        (set_field("tokenizer", value="x"), ["tokenizer is 'x'"]),
        (set_field("tokenizer", "sha256", value=3), ["tokenizer.sha256 is 3"]),
        (set_field("splits", value=[]), ["splits is []"]),
        (set_field("splits", "train", 0, value=7), ["splits.train[0] is 7"]),
        (set_field("splits", "train", 1, "tokens", value="3"), ["splits.train[1].tokens is '3'"]),
        (set_field("splits", "train", 1, "tokens", value=True), ["splits.train[1].tokens is True"]),
        (set_field("splits", "train", 1, "bytes", value=7), ["3 tokens and 7 bytes"]),
        (set_field("splits", "train", 0, "file", value="../../etc/passwd"), ["leaves the folder"]),
        (set_field("splits", "train", 0, "file", value="/etc/passwd"), ["leaves the folder"]),
    ],
)
def test_a_bad_manifest_is_one_clear_error(folder, change, words):
    edit_manifest(folder, change)
    with pytest.raises(InputError) as error:
        read_manifest(folder)
    for word in ["manifest.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"3", b"[" * 100_000, b"9" * 5000])
def test_a_manifest_that_is_none(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest.json"):
        read_manifest(folder)


def test_folders_without_a_manifest_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no such folder.*prepare_data\.py"):
        read_manifest(tmp_path / "none")
    (tmp_path / "a.txt").write_text("text")
    for raw in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(InputError, match=rf"token shards.* python scripts/prepare_data\.py {raw} --out DIR --tok"):
            read_manifest(raw)
    (tmp_path / "begun" / ".prepare").mkdir(parents=True)
    with pytest.raises(InputError, match=r"an unfinished preparation; run its command"):
        read_manifest(tmp_path / "begun")
    with pytest.raises(InputError, match=r"remote folders are not read"):
        read_manifest("s3://bucket/data")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_text("{}")
    for mds in (tmp_path, tmp_path / "train"):
        with pytest.raises(InputError, match=r"MDS folder; convert it once with python scripts/prepare_data\.py"):
            read_manifest(mds)


def test_splits_that_are_missing_or_empty(tmp_path):
    folder = write_shards(tmp_path, {"train": [[1, 2, 3]], "val": []})
    with pytest.raises(InputError, match=r"no split 'test'; the manifest has: train, val"):
        ShardSet(folder, "test")
    with pytest.raises(InputError, match=r"split 'val' is empty.*--val-fraction"):
        ShardSet(folder, "val")


def test_the_digest_follows_the_content_not_the_place(folder, tmp_path):
    same = write_shards(tmp_path / "copy", {"train": [[5, 6, 0, 7], [8, 9, 0]], "val": [[3]]}, vocab_size=10)
    other = write_shards(tmp_path / "other", {"train": [[5, 6, 0, 7], [8, 9, 1]]}, vocab_size=10)
    assert ShardSet(folder, "train").digest() == ShardSet(same, "train").digest()
    assert ShardSet(folder, "train").digest() != ShardSet(other, "train").digest()


def test_unigram_entropy(tmp_path):
    folder = write_shards(tmp_path, {"train": [[3, 3, 5, 7], [3, 3, 5, 9]]})
    expected = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) + 2 * 0.125 * math.log(0.125))
    assert unigram_entropy(folder, "train") == pytest.approx(expected, rel=1e-12)
