"""How fast token sequences come from memory-mapped shards, and what finding them among 1,000,000,000 costs."""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from trainer.data import DatasetConfig, LoaderConfig, Prefetcher, open_loader
from trainer.data.batches import TokenBatches
from trainer.data.order import Interleave, Permutation
from trainer.data.shards import FORMAT, MANIFEST, VERSION

VOCAB_SIZE = 50_368


def write_shards(folder: Path, tokens: int, shards: int) -> None:
    """Random uint16 shards of `tokens` tokens in all, with a manifest, under folder/train."""
    (folder / "train").mkdir(parents=True)
    entries = []
    for number in range(shards):
        ids = np.random.default_rng(number).integers(0, VOCAB_SIZE - 91, tokens // shards, dtype=np.uint16)
        ids.tofile(folder / f"train/shard-{number:05d}.bin")
        entries.append(
            {"file": f"train/shard-{number:05d}.bin", "tokens": len(ids), "documents": 1, "max_id": int(ids.max()),
             "bytes": ids.nbytes, "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
        )  # fmt: skip
    tokenizer = {"sha256": "none", "file": "none", "vocab_size": VOCAB_SIZE}
    manifest = {"format": FORMAT, "version": VERSION, "dtype": "uint16", "eos_id": 0, "tokenizer": tokenizer,
                "splits": {"train": entries, "val": []}}  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))


def batch_rate(batches: TokenBatches, steps: int) -> float:
    """Median tokens/s of whole global batches, read one after the other, once every page is in memory."""
    rows = range(batches.global_batch_size)
    for step in range(batches.steps_per_epoch):
        batches.batch(step, rows)
    rates = []
    for step in range(steps):
        start = time.perf_counter()
        ids = batches.batch(step, rows)
        rates.append(ids.size / (time.perf_counter() - start))
    return statistics.median(rates)


def prefetch_rate(batches: TokenBatches, steps: int, depth: int) -> float:
    """Tokens/s that a loop gets which does nothing else, micro-batches of 8 rows."""
    size = batches.global_batch_size
    micro = [range(i, min(i + 8, size)) for i in range(0, size, 8)]
    with Prefetcher(batches, lambda step: micro, 0, depth) as prefetcher:
        start = time.perf_counter()
        for step in range(steps):
            prefetcher.get(step)
        return steps * size * batches.seq_len / (time.perf_counter() - start)


def index_times(sequences: int, batch: int, repeats: int = 200) -> tuple[float, float, int]:
    """Median seconds to place `batch` samples: permuted in one source, interleaved over ten; peak bytes allocated."""
    permutation, interleave = Permutation(sequences, "benchmark"), Interleave([0.1] * 10)
    permuted, mixed = [], []
    for repeat in range(repeats):
        positions = (np.arange(batch) + repeat * (sequences // repeats)) % sequences
        start = time.perf_counter()
        permutation(positions)
        middle = time.perf_counter()
        interleave(positions)
        permuted.append(middle - start)
        mixed.append(time.perf_counter() - middle)
    tracemalloc.start()
    interleave(permutation(positions))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return statistics.median(permuted), statistics.median(mixed), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 26, help="of the shards that are made (2 bytes each)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256, help="sequences of a global batch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=1_000_000_000, help="for the index times")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name) / "shards", args.tokens, args.shards)
        config = LoaderConfig(dataset=DatasetConfig(local=f"{name}/shards"))
        batches = open_loader(config, seq_len=args.seq_len, global_batch_size=args.batch, seed=17,
                              vocab_size=VOCAB_SIZE, training=True)  # fmt: skip
        print(batches.description())
        print(
            f"batch():               {batch_rate(batches, args.steps) / 1e6:8.0f} million tokens/s, int64, ids checked"
        )
        for depth in (0, 2):
            rate = prefetch_rate(batches, args.steps, depth) / 1e6
            print(f"Prefetcher(depth={depth}):   {rate:8.0f} million tokens/s")
    permuted, mixed, peak = index_times(args.sequences, args.batch)
    print(
        f"{args.sequences:,} sequences: {permuted * 1e6:.0f} us to permute the places of a batch of {args.batch}, "
        f"{mixed * 1e6:.0f} us to deal it to ten sources; {peak / 1024:.0f} KiB allocated at most"
    )


if __name__ == "__main__":
    main()
