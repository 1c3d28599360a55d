"""MDS folders built byte by byte: every layout of tokens and text is read, every fault named."""

import gzip
import json
import struct

import numpy as np
import pytest
import zstandard
from data_files import write_mds

from trainer.data.mds import read_index, read_shard
from trainer.errors import InputError

TEXTS = ["first", "zweiter Text, größer", "三"]
TOKEN_ROWS = [[1, 2, 3], [0], [65_000, 7]]


def read(folder, text_field="text", bytes_dtype="int64"):
    out = []
    for shard in read_index(folder):
        for document in read_shard(shard, text_field, bytes_dtype):
            out.append(document if isinstance(document, str) else document.tolist())
    return out


def text_rows(texts):
    return [[text.encode()] for text in texts]


def integers(values, code):
    return struct.pack(f"<{len(values)}{code}", *values)


def test_text_of_several_shards_in_order(tmp_path):
    folder = write_mds(tmp_path / "m", [text_rows(TEXTS[:2]), text_rows(TEXTS[2:])], [("text", "str", None)])
    assert read(folder) == TEXTS


def test_text_between_other_columns(tmp_path):
    columns = [("count", "int", 8), ("junk", "pkl", None), ("text", "str", None), ("url", "str", None)]
    rows = [[struct.pack("<q", i), b"never unpickled", text.encode(), b"u" * i] for i, text in enumerate(TEXTS)]
    assert read(write_mds(tmp_path / "m", [rows], columns)) == TEXTS
    assert read(write_mds(tmp_path / "n", [rows], columns), text_field="url") == ["", "u", "uu"]


@pytest.mark.parametrize(
    ("compression", "compress"),
    [
        ("zstd", zstandard.ZstdCompressor().compress),
        ("zstd:7", zstandard.ZstdCompressor(level=7, write_content_size=False).compress),
        ("gz", gzip.compress),
    ],
)
@pytest.mark.parametrize("keep_raw", [False, True])
def test_compressed_shards(tmp_path, compression, compress, keep_raw):
    folder = write_mds(
        tmp_path / "m", [text_rows(TEXTS)], [("text", "str", None)], compress, compression, keep_raw=keep_raw
    )
    assert read_index(folder)[0].path.suffix == (".mds" if keep_raw else f".{compression.split(':')[0]}")
    assert read(folder) == TEXTS


@pytest.mark.parametrize(("dtype", "code"), [("int64", "q"), ("int32", "i"), ("uint16", "H"), ("uint32", "I")])
def test_tokens_as_bytes(tmp_path, dtype, code):
    rows = [[integers(row, code)] for row in TOKEN_ROWS]
    folder = write_mds(tmp_path / "m", [rows], [("tokens", "bytes", None)])
    assert read(folder, bytes_dtype=dtype) == TOKEN_ROWS


def test_tokens_as_ndarrays(tmp_path):
    fixed_dtype = [[b"\x04" + bytes([len(row)]) + integers(row, "i")] for row in TOKEN_ROWS]  # 1 axis, uint8 length
    folder = write_mds(tmp_path / "dtype", [fixed_dtype], [("tokens", "ndarray:int32", None)])
    assert read(folder) == TOKEN_ROWS

    free = [[bytes([16, 0x05]) + struct.pack("<H", len(row)) + integers(row, "H")] for row in TOKEN_ROWS]
    assert read(write_mds(tmp_path / "free", [free], [("tokens", "ndarray", None)])) == TOKEN_ROWS

    fixed = [[integers([1, 2, 3], "I")], [integers([4, 5, 6], "I")]]
    folder = write_mds(tmp_path / "fixed", [fixed], [("tokens", "ndarray:uint32:3", 12)])
    assert read(folder) == [[1, 2, 3], [4, 5, 6]]


def test_an_ndarray_under_another_name_is_named_like_a_text_field(tmp_path):
    rows = [[b"doc", b"\x04\x02" + integers([9, 8], "H")]]
    folder = write_mds(tmp_path / "m", [rows], [("id", "str", None), ("input_ids", "ndarray:uint16", None)])
    assert read(folder, text_field="input_ids") == [[9, 8]]


def test_a_value_decodes_as_numpy_has_it(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50_000, 700).astype(np.int32) for _ in range(5)]
    encoded = [[b"\x05" + struct.pack("<H", 700) + row.tobytes()] for row in rows]  # 1 axis, uint16 length
    assert read(write_mds(tmp_path / "m", [encoded], [("tokens", "ndarray:int32", None)])) == [r.tolist() for r in rows]


def edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path):
    return write_mds(tmp_path / "m", [text_rows(TEXTS)], [("text", "str", None)])


def flip(folder):
    data = bytearray((folder / "shard.00000.mds").read_bytes())
    data[-1] ^= 1
    (folder / "shard.00000.mds").write_bytes(data)


def truncate(folder):
    path = folder / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"shard\.00000\.mds: sha1 is .*altered"),
        (truncate, r"shard\.00000\.mds: holds \d+ bytes of samples, its index\.json says"),
        (lambda f: (f / "shard.00000.mds").unlink(), r"shard\.00000\.mds: shard cannot be opened"),
        (lambda f: (f / "index.json").write_text("{"), r"index\.json: not the index"),
        (lambda f: (f / "index.json").write_text('{"version": 1, "shards": []}'), "version is 1"),
        (lambda f: edit_index(f, lambda s: s.update(samples=4)), "does not hold the 4 samples"),
        (lambda f: edit_index(f, lambda s: s.update(format="json")), "format is 'json'"),
        (lambda f: edit_index(f, lambda s: s["raw_data"].update(basename="../x")), "leaves the folder"),
        (lambda f: edit_index(f, lambda s: s["raw_data"].update(bytes="many")), "not the index"),
        (lambda f: edit_index(f, lambda s: s.pop("column_names")), "not the index"),
        (lambda f: edit_index(f, lambda s: s.update(column_names=["body"])), "no column 'tokens' or 'text'.*body"),
        (lambda f: edit_index(f, lambda s: s.update(column_encodings=["pkl"])), "encoding 'pkl'"),
        (lambda f: edit_index(f, lambda s: s.update(column_encodings=[3])), "not the index"),
        (lambda f: edit_index(f, lambda s: s.update(column_encodings=[])), "not the index"),
        (lambda f: edit_index(f, lambda s: s.update(column_sizes=["3"])), "not the index"),
        (lambda f: edit_index(f, lambda s: s["raw_data"].update(basename="a\0b")), "leaves the folder"),
        (lambda f: (f / "index.json").write_text("[" * 100_000), "not the index"),
        (lambda f: (f / "index.json").write_text("9" * 5000), "not the index"),
        (lambda f: (f / "index.json").write_text('{"version": 2, "shards": 3}'), "not the index"),
        (lambda f: edit_index(f, lambda s: s.update(column_sizes=[3])), "sample 0: damaged"),
    ],
)
def test_faults_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        read(folder)


def test_text_that_is_not_utf8_names_its_sample(tmp_path):
    folder = write_mds(tmp_path / "m", [[[b"good"], [b"\xff\xff"]]], [("text", "str", None)])
    with pytest.raises(InputError, match="sample 1: damaged"):
        read(folder)


def test_other_compressions_are_refused_by_name(tmp_path):
    folder = write_mds(tmp_path / "m", [text_rows(TEXTS)], [("text", "str", None)], bytes, "snappy")
    with pytest.raises(InputError, match="compression 'snappy' is not read"):
        read(folder)


def test_a_damaged_zstd_shard(tmp_path):
    folder = write_mds(tmp_path / "m", [text_rows(TEXTS)], [("text", "str", None)], bytes, "zstd")
    with pytest.raises(InputError, match=r"shard\.00000\.mds\.zstd: damaged"):
        read(folder)


def test_ids_that_do_not_fit_the_integers(tmp_path):
    folder = write_mds(tmp_path / "m", [[[b"123456789"]]], [("tokens", "bytes", None)])
    with pytest.raises(InputError, match="sample 0"):
        read(folder)
