"""Batches depend on the seed, the step and the row alone: order, epochs, mixing, evaluation, prefetching, errors."""

import json
import os
import re
import struct
import threading
import time
import tracemalloc

import numpy as np
import pytest
from data_files import edit_manifest, write_shards

from trainer.data import DatasetConfig, LoaderConfig, MixEntry, Prefetcher, open_loader
from trainer.data.order import Permutation
from trainer.errors import InputError

S = 4


def numbered(folder, lengths, first=0, dtype="uint16", split="train"):
    """Shards of `lengths` tokens; each sequence of S tokens starts with its number, the rest are 60_000 (or a tail)."""
    shards, number = [], first
    for length in lengths:
        ids = [60_000] * length
        for place in range(0, length // S * S, S):
            ids[place] = number
            number += 1
        shards.append(ids)
    return write_shards(folder, {split: shards}, dtype=dtype, vocab_size=60_001)


def loader(dataset, batch=5, seed=17, training=True, vocab_size=60_001, seq_len=S, **more):
    config = LoaderConfig(dataset=dataset)
    return open_loader(
        config, seq_len=seq_len, global_batch_size=batch, seed=seed, vocab_size=vocab_size, training=training, **more
    )


@pytest.fixture
def folder(tmp_path):
    return numbered(tmp_path / "a", [4 * S + 3, S, 3, 7 * S])  # 12 sequences, one shard shorter than a sequence


def firsts(batches, steps, size):
    return np.concatenate([batches.batch(step, range(size))[:, 0] for step in steps])


def test_epochs_run_on_and_each_is_a_permutation(folder):
    batches = loader(DatasetConfig(local=str(folder)))
    assert (batches.sequences, batches.steps_per_epoch, batches.seq_len) == (12, 2, S)
    order = firsts(batches, range(12), 5)  # five epochs of 12
    epochs = order.reshape(5, 12)
    assert (np.sort(epochs, axis=1) == np.arange(12)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
    for epoch in range(5):
        expected = Permutation(12, f"seed 17 source 0 epoch {epoch}")(np.arange(12))
        assert epochs[epoch].tolist() == expected.tolist()


def test_a_batch_is_int64_rows_of_the_shard(folder):
    ids = loader(DatasetConfig(local=str(folder))).batch(0, range(5))
    assert (ids.dtype, ids.shape) == (np.int64, (5, S))
    assert (ids[:, 1:] == 60_000).all()
    assert ids.flags.writeable


def test_rows_do_not_depend_on_how_they_are_dealt(folder):
    batches = loader(DatasetConfig(local=str(folder)), batch=8)
    for step in (0, 1, 2, 1000):
        whole = batches.batch(step, range(8))
        for world in (2, 4, 8):
            share = 8 // world
            parts = [batches.batch(step, range(rank * share, (rank + 1) * share)) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(batches.batch(step, [6, 1]), whole[[6, 1]])
        assert np.array_equal(loader(DatasetConfig(local=str(folder)), batch=8).batch(step, range(8)), whole)


def test_the_global_batch_only_cuts_the_order(folder):
    a = firsts(loader(DatasetConfig(local=str(folder)), batch=4), range(6), 4)
    b = firsts(loader(DatasetConfig(local=str(folder)), batch=6), range(4), 6)
    assert a.tolist() == b.tolist()


def test_a_batch_larger_than_the_data_wraps(folder):
    batches = loader(DatasetConfig(local=str(folder)), batch=30)
    assert batches.steps_per_epoch == 1
    assert np.bincount(firsts(batches, [0], 30)).tolist() != [3] * 12  # 2.5 epochs
    assert np.bincount(firsts(batches, [0, 1], 30)).tolist() == [5] * 12


def test_seeds(folder):
    by_seed = [
        firsts(loader(dataset, seed=seed), range(4), 5).tolist()
        for dataset, seed in [
            (DatasetConfig(local=str(folder)), 1),
            (DatasetConfig(local=str(folder)), 2),
            (DatasetConfig(local=str(folder), shuffle_seed=1), 2),
        ]
    ]
    assert by_seed[0] == by_seed[2] != by_seed[1]


def test_without_shuffling_the_shards_are_read_in_order(folder):
    batches = loader(DatasetConfig(local=str(folder), shuffle=False))
    assert firsts(batches, range(5), 5).tolist() == [*range(12), *range(12), 0]


def test_rows_outside_the_batch_are_refused(folder):
    batches = loader(DatasetConfig(local=str(folder)))
    for step, rows in [(-1, range(5)), (0, range(4, 6)), (0, range(-1, 2))]:
        with pytest.raises(ValueError, match="rows lie in range"):
            batches.batch(step, rows)
    assert batches.batch(0, range(0)).shape == (0, S)


# Mixing


@pytest.fixture
def mix(tmp_path):
    numbered(tmp_path / "a", [12 * S])
    numbered(tmp_path / "b", [3 * S, 2 * S], first=1000, dtype="uint32")
    numbered(tmp_path / "c", [40 * S], first=2000)
    return [MixEntry(local=str(tmp_path / name), weight=weight) for name, weight in zip("abc", (0.5, 0.2, 0.3))]


def test_a_mix_is_exact_and_each_source_keeps_its_epochs(mix):
    batches = loader(DatasetConfig(mix=mix), batch=10)
    assert batches.sequences == 57
    order = []
    for step in range(24):
        ids = batches.batch(step, range(10))[:, 0]
        source = batches.source_of(step, range(10))
        assert np.bincount(source).tolist() == [5, 2, 3]
        assert (ids // 1000).tolist() == source.tolist()
        order += ids.tolist()
    for low, count in [(0, 12), (1000, 5), (2000, 40)]:
        mine = [i - low for i in order if low <= i < low + 1000]
        for epoch in range(len(mine) // count):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_mix_is_dealt_by_row(mix):
    batches = loader(DatasetConfig(mix=mix), batch=10)
    whole = batches.batch(3, range(10))
    assert np.array_equal(np.concatenate([batches.batch(3, range(i, i + 5)) for i in (0, 5)]), whole)
    assert batches.source_of(3, range(5, 10)).tolist() == batches.source_of(3, range(10))[5:].tolist()


def test_a_mix_tells_its_shares(mix):
    text = loader(DatasetConfig(mix=mix)).description()
    assert text.count("\n") == 2
    assert "50.00% of the samples" in text and "40 sequences of 4" in text


def test_mix_errors(mix, tmp_path):
    with pytest.raises(InputError, match=r"train_loader.dataset.mix: weight 0"):
        loader(DatasetConfig(mix=[*mix, MixEntry(local=mix[0].local, weight=0)]))
    with pytest.raises(InputError, match="exactly one of local"):
        loader(DatasetConfig(mix=mix, local=mix[0].local))
    with pytest.raises(InputError, match="exactly one of local"):
        loader(DatasetConfig())
    with pytest.raises(InputError, match="evaluation reads one shard set"):
        loader(DatasetConfig(mix=mix), training=False)
    write_shards(tmp_path / "d", {"train": [[1] * 8]}, tokenizer_sha256="1" * 64)
    with pytest.raises(InputError, match="different tokenizers"):
        loader(DatasetConfig(mix=[*mix, MixEntry(local=str(tmp_path / "d"))]))


# Identity


def test_the_fingerprint_sees_what_changes_the_samples(mix, tmp_path):
    def of(dataset, **more):
        return json.dumps(loader(dataset, **more).fingerprint(), sort_keys=True)

    base = of(DatasetConfig(mix=mix))
    assert base == of(DatasetConfig(mix=mix), batch=30)
    assert base == of(DatasetConfig(mix=[MixEntry(entry.local, weight=10 * entry.weight) for entry in mix]))
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = [MixEntry(local=str(tmp_path / "moved"), weight=0.5), *mix[1:]]
    assert base == of(DatasetConfig(mix=moved))
    others = [
        of(DatasetConfig(mix=moved), seed=18),
        of(DatasetConfig(mix=moved), seq_len=8),
        of(DatasetConfig(mix=moved, shuffle=False)),
        of(DatasetConfig(mix=[MixEntry(local=moved[0].local, weight=0.4), *moved[1:]])),
        of(DatasetConfig(mix=moved[1:])),
    ]
    numbered(tmp_path / "moved", [12 * S], first=1)
    others.append(of(DatasetConfig(mix=moved)))
    assert len({base, *others}) == 7


# Opening


def test_opening_names_what_does_not_fit(folder, tmp_path):
    dataset = DatasetConfig(local=str(folder))
    with pytest.raises(InputError, match=r"holds token id 60000, vocab_size is 60000"):
        loader(dataset, vocab_size=60_000)
    with pytest.raises(InputError, match="made with a tokenizer of SHA-256"):
        loader(dataset, tokenizer_sha256="e" * 64)
    assert loader(dataset, tokenizer_sha256="0" * 64).sequences == 12
    with pytest.raises(InputError, match=r"no shard of split 'train' is as long as one sequence.*max_seq_len 100"):
        loader(dataset, seq_len=100)
    with pytest.raises(InputError, match="no split 'val'"):
        loader(dataset, training=False)
    with pytest.raises(InputError, match="num_workers: is -1"):
        config = LoaderConfig(dataset=dataset, num_workers=-1)
        open_loader(config, seq_len=S, global_batch_size=2, seed=0, vocab_size=60_001, training=True)


def test_opening_reads_no_tokens(folder):
    shard = folder / "train/shard-00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    loader(DatasetConfig(local=str(folder)))


@pytest.mark.parametrize("several", [False, True])
def test_an_id_outside_the_vocabulary_names_step_row_and_shard(folder, tmp_path, several):
    path = folder / "train/shard-00003.bin"
    ids = list(struct.unpack("<28H", path.read_bytes()))
    ids[2 * S + 3] = 60_001  # sequence 2 of this shard, 7 of the set
    path.write_bytes(struct.pack("<28H", *ids))
    if several:  # two sources take turns: the set's eighth sample is the mix's sixteenth
        numbered(tmp_path / "b", [3 * S])
        mix = [MixEntry(local=str(tmp_path / "b")), MixEntry(local=str(folder))]
        batches, step, row = loader(DatasetConfig(mix=mix, shuffle=False), batch=4), 3, 2
        assert batches.source_of(3, range(4)).tolist() == [1, 0, 1, 0]
    else:
        batches, step, row = loader(DatasetConfig(local=str(folder), shuffle=False), batch=4), 1, 3
    message = f"step {step}, row {row}: token 11 of {path} is id 60001, vocab_size is 60001"
    for rows in (range(4), [row]):
        with pytest.raises(InputError, match=re.escape(message)):
            batches.batch(step, rows)
    batches.batch(step, [i for i in range(4) if i != row])


def test_a_billion_sequences(tmp_path):
    """A sparse file stands for 10^9 sequences; opening and reading allocate next to nothing."""
    folder = write_shards(tmp_path, {"train": [[1, 2]]}, vocab_size=10)
    sequences = 1_000_000_000

    def enlarge(manifest):
        manifest["splits"]["train"][0] |= {"tokens": 2 * sequences, "bytes": 4 * sequences}

    edit_manifest(folder, enlarge)
    os.truncate(folder / "train/shard-00000.bin", 4 * sequences)
    tracemalloc.start()
    batches = loader(DatasetConfig(local=str(folder)), seq_len=2, batch=64, vocab_size=10)
    for step in (0, 1, batches.steps_per_epoch - 1, batches.steps_per_epoch + 1):
        assert batches.batch(step, range(8)).shape == (8, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batches.sequences == sequences
    assert peak < 1 << 20


# Evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_evaluation_sees_every_sequence_once(tmp_path, world, batch_size):
    folder = numbered(tmp_path, [7 * S, 4 * S], split="val")
    batches = loader(DatasetConfig(local=str(folder)), training=False)
    by_rank = [list(batches.eval_batches(rank, world, batch_size)) for rank in range(world)]
    assert len({len(rank) for rank in by_rank}) == 1
    seen = []
    for rank in by_rank:
        for ids, counted in rank:
            assert (ids.dtype, ids.shape) == (np.int64, (batch_size, S))
            seen += ids[:counted, 0].tolist()
            assert (ids[counted:, 0] == 10).all()
    assert sorted(seen) == list(range(11))
    if world == 1:
        assert seen == list(range(11))


# Prefetching


def test_prefetched_arrays_are_the_batches(folder):
    batches = loader(DatasetConfig(local=str(folder)), batch=6)

    def micro(step):
        return [range(2), range(2, 3), range(4, 6)]

    for depth in (0, 1, 3):
        with Prefetcher(batches, micro, 4, depth) as prefetcher:
            for step in range(4, 12):
                arrays = prefetcher.get(step)
                assert len(arrays) == 3
                for rows, ids in zip(micro(step), arrays):
                    assert np.array_equal(ids, batches.batch(step, rows))


def test_the_thread_reads_ahead_and_no_further_than_depth(folder):
    batches = loader(DatasetConfig(local=str(folder)), batch=2)
    asked = []

    def micro(step):
        asked.append(step)
        return [range(2)]

    with Prefetcher(batches, micro, 0, 2) as prefetcher:
        deadline = time.monotonic() + 10
        while len(asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert asked == [0, 1, 2]  # two ready, one waiting for room
        prefetcher.get(0)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 2])
def test_errors_reach_the_step_they_concern(folder, depth):
    batches = loader(DatasetConfig(local=str(folder)), batch=2)

    def micro(step):
        return [range(2)] if step < 3 else [range(5)]

    with Prefetcher(batches, micro, 0, depth) as prefetcher:
        for step in range(3):
            prefetcher.get(step)
        with pytest.raises(ValueError, match="step 3"):
            prefetcher.get(3)
    with pytest.raises(ValueError, match="closed"):
        prefetcher.get(3)


def test_steps_are_asked_for_in_order(folder):
    with Prefetcher(loader(DatasetConfig(local=str(folder))), lambda step: [range(1)], 5, 1) as prefetcher:
        with pytest.raises(ValueError, match="step 6 asked for, but 5 is next"):
            prefetcher.get(6)
