"""Every kind of input is found, cut and read: the same documents however it is cut, and bad ones named by place."""

import gzip
import json

import pytest
import zstandard
from data_files import write_mds

from trainer.data.sources import Reading, cut_files, list_files, read_piece
from trainer.errors import InputError

READING = Reading("text", "file", "int64")
TEXTS = [f"document {i} " + "ü" * (i % 7) for i in range(40)]


def read(inputs, piece_bytes=1 << 20, reading=READING):
    pieces = cut_files(list_files([str(name) for name in inputs]), False, piece_bytes)
    return [document for piece in pieces for document in read_piece(piece, reading)]


def jsonl(texts, field="text"):
    return "".join(
        json.dumps({"n": i, field: text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)
    ).encode()


@pytest.mark.parametrize("piece_bytes", [1, 7, 40, 41, 42, 100, 1000, 1 << 20])
def test_json_lines_do_not_depend_on_the_cuts(tmp_path, piece_bytes):
    path = tmp_path / "a.jsonl"
    for data in (jsonl(TEXTS), jsonl(TEXTS)[:-1], jsonl(TEXTS).replace(b"\n", b"\r\n\n  \n")):
        path.write_bytes(data)
        assert read([path], piece_bytes) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".zstd"])
def test_compressed_json_lines_and_text(tmp_path, suffix):
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(jsonl(TEXTS[:20])) + compress(jsonl(TEXTS[20:])))  # two frames
    assert read([tmp_path / f"a.jsonl{suffix}"]) == TEXTS
    (tmp_path / f"b.txt{suffix}").write_bytes(compress(b"one\ntext"))
    assert read([tmp_path / f"b.txt{suffix}"]) == ["one\ntext"]


@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
def test_parquet_by_row_groups(tmp_path, piece_bytes):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"n": list(range(40)), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert read([tmp_path / "a.parquet"], piece_bytes) == TEXTS
    with pytest.raises(InputError, match=r"a\.parquet: no column 'body' .*--text-field.*n, text"):
        read([tmp_path / "a.parquet"], reading=Reading("body", "file", "int64"))
    with pytest.raises(InputError, match=r"a\.parquet: row 0 of row group 0: 'n' is int, expected text"):
        read([tmp_path / "a.parquet"], reading=Reading("n", "file", "int64"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"b\.parquet: not readable as Parquet"):
        read([tmp_path / "b.parquet"])


def test_text_units(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n \nfour")
    for unit, expected in {
        "file": ["one\ntwo\n\n\nthree\n \nfour"],
        "paragraph": ["one\ntwo", "three\n ", "four"],
        "line": ["one", "two", "three", "four"],
    }.items():
        assert read([tmp_path / "a.txt"], reading=Reading("text", unit, "int64")) == expected


def test_a_folder_is_read_sorted_and_passes_over_other_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("third")
    (tmp_path / "b" / "a.jsonl").write_bytes(jsonl(["second"]))
    (tmp_path / "a.md").write_text("first")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("{}")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read([tmp_path]) == ["first", "second", "third"]


def test_globs_and_files_of_any_name(tmp_path):
    (tmp_path / "x.py").write_text("code")
    (tmp_path / "y.py").write_text("more")
    assert read([tmp_path / "*.py"]) == ["code", "more"]
    assert read([tmp_path / "y.py", tmp_path / "x.py"]) == ["more", "code"]


def test_a_hub_data_set_is_read_from_its_arrow_files(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    real = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path))
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return real

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(["owner/name"]) == TEXTS
    assert read(["owner/name:en@validation"]) == TEXTS
    assert calls == [(("owner/name", None), {"split": "train"}), (("owner/name", "en"), {"split": "validation"})]

    def fail(*args, **kwargs):
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"owner/name: .*hub data set.*\(offline\)"):
        read(["owner/name"])


@pytest.mark.parametrize("name", ["nothing/here.jsonl", "nothing.txt.gz", "*.nothing", "a/b/c"])
def test_inputs_that_are_not_there(name):
    with pytest.raises(InputError, match=r"no such file|no file matches"):
        read([name])


def test_folders_without_documents(tmp_path):
    with pytest.raises(InputError, match=r"no \.jsonl.* file in it"):
        read([tmp_path])
    columns = [("text", "str", None)]
    for split in ("train", "val"):
        write_mds(tmp_path / split, [[[b"x"]]], columns)
    assert read([tmp_path / "train"]) == ["x"]
    with pytest.raises(InputError, match=r"holds MDS folders .*train, .*val.*--val"):
        read([tmp_path])


@pytest.mark.parametrize("piece_bytes", [5, 60, 1 << 20])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "not JSON"),
        (b"[1]", "a JSON list, expected an object with the field 'text'"),
        (b'{"body": "x"}', r"no field 'text' \(--text-field\); the line has: body"),
        (b'{"text": null}', "field 'text' is NoneType"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message, piece_bytes):
    lines = jsonl(TEXTS[:30]).splitlines()
    lines[17] = line
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=rf"a\.jsonl, line 18: .*{message}"):
        read([tmp_path / "a.jsonl"], piece_bytes)


def test_bad_text_and_broken_compression_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xfe\xff\n")
    with pytest.raises(InputError, match=r"a\.txt, line 3: not UTF-8"):
        read([tmp_path / "a.txt"])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS))[:-20])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: cannot be read .*; copy it again"):
        read([tmp_path / "a.jsonl.gz"])
    (tmp_path / "a.txt.zst").write_bytes(b"no zstd")
    with pytest.raises(InputError, match=r"a\.txt\.zst: cannot be read"):
        read([tmp_path / "a.txt.zst"])


def test_a_shard_that_is_gone_is_named(tmp_path):
    write_mds(tmp_path / "m", [[[b"x"]]], [("text", "str", None)])
    (piece,) = cut_files(list_files([str(tmp_path / "m")]), False, 1 << 20)
    (tmp_path / "m" / "shard.00000.mds").unlink()
    with pytest.raises(InputError, match=r"shard\.00000\.mds: cannot be opened .*copy the folder again"):
        piece.state()


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


@pytest.mark.parametrize("content_size", [True, False])
def test_zstd_files_of_several_frames(tmp_path, content_size):
    compressor = zstandard.ZstdCompressor(write_content_size=content_size)
    frames = [compressor.compress(jsonl(TEXTS[i : i + 10])) for i in range(0, 40, 10)]
    (tmp_path / "a.jsonl.zst").write_bytes(SKIPPABLE + b"".join(frames[:2]) + compressor.compress(b"") + SKIPPABLE)
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames[2:]))
    assert read([tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"]) == TEXTS
    data = jsonl([f"{i} long text" * 1000 for i in range(1000)])  # many times the reader's chunk
    (tmp_path / "c.jsonl.zst").write_bytes(compressor.compress(data) * 2)
    assert len(read([tmp_path / "c.jsonl.zst"])) == 2000


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_a_truncated_compressed_file_is_refused_wherever_it_ends(tmp_path, kind, suffix):
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a{kind}{suffix}"
    frame = compress(jsonl(TEXTS[:20]))
    for size in range(len(frame)):
        path.write_bytes(frame[:size])
        with pytest.raises(InputError, match=rf"a\{kind}\{suffix}: .*copy it again"):
            read([path])
    for size in range(1, len(frame), 7):  # in the second frame
        path.write_bytes(frame + frame[:size])
        with pytest.raises(InputError, match="copy it again"):
            read([path])
