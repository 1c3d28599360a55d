"""Small data files for tests, written byte by byte: token shards, MDS folders, a tokenizer."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

EOS = "<|endoftext|>"


def write_shards(folder, splits, dtype="uint16", vocab_size=1000, tokenizer_sha256="0" * 64):
    """A folder of token shards; `splits` maps a split to the lists of ids of its shards."""
    folder = Path(folder)
    manifest = {
        "format": "mpt-token-shards",
        "version": 1,
        "dtype": dtype,
        "eos_id": 0,
        "tokenizer": {"sha256": tokenizer_sha256, "file": "tokenizer.json", "vocab_size": vocab_size},
        "splits": {},
    }
    for split, shards in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        entries = manifest["splits"][split] = []
        for number, ids in enumerate(shards):
            data = struct.pack(f"<{len(ids)}{'H' if dtype == 'uint16' else 'I'}", *map(int, ids))
            name = f"{split}/shard-{number:05d}.bin"
            (folder / name).write_bytes(data)
            entries.append(
                {
                    "file": name,
                    "tokens": len(ids),
                    "documents": list(ids).count(0),
                    "max_id": int(max(ids)),
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            )
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def edit_manifest(folder, change):
    """Applies change(manifest dict) to a folder's manifest.json."""
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def mds_shard_bytes(samples, sizes):
    """A raw MDS shard: samples are lists of the columns' bytes, sizes the columns' fixed sizes or None."""
    encoded = []
    for columns in samples:
        head = b"".join(struct.pack("<I", len(c)) for c, size in zip(columns, sizes) if size is None)
        encoded.append(head + b"".join(columns))
    settings = json.dumps({"column_sizes": sizes, "compression": None, "format": "mds"}).encode()
    place = 4 + 4 * (len(samples) + 1) + len(settings)
    offsets = [place]
    for sample in encoded:
        offsets.append(offsets[-1] + len(sample))
    return struct.pack("<I", len(samples)) + struct.pack(f"<{len(offsets)}I", *offsets) + settings + b"".join(encoded)


def write_mds(folder, shards, columns, compress=None, compression=None, hashes=("sha1",), keep_raw=False):
    """An MDS folder; `columns`: (name, encoding, fixed size or None); `compress` maps a shard to its file."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    names, encodings, sizes = (list(x) for x in zip(*columns))
    entries = []
    for number, samples in enumerate(shards):
        raw = mds_shard_bytes(samples, sizes)
        name = f"shard.{number:05d}.mds"
        entry = {
            "column_encodings": encodings,
            "column_names": names,
            "column_sizes": sizes,
            "compression": compression,
            "format": "mds",
            "hashes": list(hashes),
            "raw_data": {
                "basename": name,
                "bytes": len(raw),
                "hashes": {kind: hashlib.new(kind, raw).hexdigest() for kind in hashes},
            },
            "samples": len(samples),
            "size_limit": 1 << 26,
            "version": 2,
            "zip_data": None,
        }
        if compress is not None:
            packed = compress(raw)
            suffix = compression.split(":")[0]
            entry["zip_data"] = {"basename": f"{name}.{suffix}", "bytes": len(packed), "hashes": {}}
            (folder / f"{name}.{suffix}").write_bytes(packed)
        if compress is None or keep_raw:
            (folder / name).write_bytes(raw)
        entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"shards": entries, "version": 2}))
    return folder


def write_tokenizer(folder, texts=("a small text to learn some merges from, and a small text again",), vocab_size=300):
    """A byte-level BPE in folder/tokenizer.json, `<|endoftext|>` being 0; returns its path."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def read_tokens(out, split):
    """All tokens of a split in order, read as plain files; independent of the package."""
    manifest = json.loads((Path(out) / "manifest.json").read_text())
    dtype = {"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]]
    parts = [np.fromfile(Path(out) / shard["file"], dtype) for shard in manifest["splits"][split]]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def documents(out, split, tokenizer):
    """A split's documents as texts."""
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer))
    ids = read_tokens(out, split)
    ends = np.flatnonzero(ids == 0)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1, "the last document has no EOS"
    return [decoder.decode(part.tolist()[:-1]) for part in np.split(ids, ends + 1)[:-1]]
