"""Batches of token sequences as a pure function of the seed, the step and the rows: the trainer's view of the data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data import order
from trainer.data.config import LoaderConfig, MixEntry
from trainer.data.order import IntArray, Interleave, Permutation
from trainer.data.shards import REMEDY, ShardSet
from trainer.errors import InputError


@dataclass(frozen=True)
class Source:
    """One shard set and its weight in the mix. `ends[i]` is the number of sequences in shards 0..i."""

    shards: ShardSet
    weight: float
    ends: IntArray

    @property
    def sequences(self) -> int:
        return int(self.ends[-1])


class TokenBatches:
    """Sequences of `seq_len` tokens cut from the shards, in an order that only the seed decides.

    A shard holds tokens // seq_len sequences one after the other (its last tokens % seq_len tokens are not used).
    Sample g = step * global_batch_size + row. With one source of n sequences, sample g belongs to epoch g // n and
    reads place g % n of that epoch's own permutation: batches run across the end of an epoch, nothing is dropped, and
    no sequence comes twice within one. In a mix, sample g first goes to a source (exactly by weight, see
    order.Interleave) as that source's sample number j, and epoch and place follow from j in the same way, each source
    having epochs of its own. Nothing depends on the world size, and no state has to be saved but the step.
    """

    def __init__(self, sources: list[Source], *, seq_len: int, global_batch_size: int, seed: int, vocab_size: int,
                 shuffle: bool) -> None:  # fmt: skip
        self.sources = sources
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.vocab_size = vocab_size
        self.shuffle = shuffle
        self.excerpts = any(source.shards.manifest.excerpt_tokens is not None for source in sources)
        self.sequences = sum(source.sequences for source in sources)
        self.steps_per_epoch = max(1, self.sequences // global_batch_size)
        self._interleave = Interleave([source.weight for source in sources])
        self._permutation = lru_cache(maxsize=64)(self._make_permutation)

    def batch(self, step: int, rows: Sequence[int]) -> npt.NDArray[np.int64]:
        """Rows `rows` (within range(global_batch_size)) of global batch `step` >= 0: int64 ids (len(rows), seq_len).

        InputError names step, row, shard and place of an id that is not below vocab_size.
        """
        source, sequence = self._locate(step, rows)
        if len(self.sources) == 1:
            return self._read(0, sequence, step, np.asarray(rows, np.int64)).astype(np.int64)
        out = np.empty((len(rows), self.seq_len), dtype=np.int64)
        for i in np.unique(source).tolist():
            (mine,) = np.nonzero(source == i)
            out[mine] = self._read(i, sequence[mine], step, np.asarray(rows, np.int64)[mine])
        return out

    def source_of(self, step: int, rows: Sequence[int]) -> IntArray:
        """Which source (its place in the mix) each row of global batch `step` comes from: int64 (len(rows),)."""
        return self._locate(step, rows)[0]

    @property
    def eos_id(self) -> int:
        return self.sources[0].shards.manifest.eos_id

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sequence."""
        return float(self.seq_len)

    def tokens(self, ids: npt.NDArray[np.int64]) -> int:
        """Tokens in rows of `batch`, padding of excerpts aside."""
        return ids.size - int(self._padding(ids).sum()) if self.excerpts else ids.size

    def arguments(
        self, ids: npt.NDArray[np.int64], *, sequence_id: bool, prefix_mask: bool
    ) -> dict[str, npt.NDArray[Any]]:
        """Arguments of the model's forward for rows of `batch`: every token is an input and a label, but for what fills
        up a padded excerpt, which is no label.

        sequence_id: whether the model takes sequence ids; a document ends with its end-of-document token. prefix_mask:
        whether it takes a prefix, an empty one.
        """
        labels = np.where(self._padding(ids), -100, ids) if self.excerpts else ids
        out: dict[str, npt.NDArray[Any]] = {"input_ids": ids, "labels": labels}
        if sequence_id:
            ends = np.cumsum(ids == self.eos_id, axis=1)
            out["sequence_id"] = np.pad(ends[:, :-1], ((0, 0), (1, 0)))
        if prefix_mask:
            out["prefix_mask"] = np.zeros(ids.shape, dtype=bool)
        return out

    def eval_batches(
        self, rank: int, world: int, batch_size: int, sequences: int | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
        """Every sequence once, in order, dealt to the ranks: int64 ids (batch_size, seq_len) and how many rows count.

        Each rank gets the same number of batches. Past the end, rows repeat the last sequence and do not count; the
        second value, 0..batch_size, is the number of leading rows that do. sequences: only so many, the first ones.
        """
        if len(self.sources) != 1:
            raise ValueError("eval_batches reads one source, this loader mixes several")
        end = self.sequences if sequences is None else min(sequences, self.sequences)
        for start in range(0, end, world * batch_size):
            places = start + rank * batch_size + np.arange(batch_size, dtype=np.int64)
            counted = int((places < end).sum())
            sequence = np.minimum(places, end - 1)
            yield self._read(0, sequence, start // (world * batch_size), sequence).astype(np.int64), counted

    def fingerprint(self) -> dict[str, Any]:
        """What decides the order and content of the samples, as JSON values: a resumed run compares it.

        Paths are not in it (data may move), nor is the global batch size (the run's own fingerprint has it).
        """
        sources = [
            {"split": s.shards.split, "weight": weight, "sequences": s.sequences, "digest": s.shards.digest()}
            for s, weight in zip(self.sources, self._interleave.weights)
        ]
        return {"order": order.VERSION, "seq_len": self.seq_len, "seed": self.seed, "shuffle": self.shuffle,
                "sources": sources}  # fmt: skip

    def description(self) -> str:
        """A line per source, for people."""
        total = sum(source.weight for source in self.sources)
        lines = []
        for source in self.sources:
            share = f", {source.weight / total:.2%} of the samples" if len(self.sources) > 1 else ""
            lines.append(
                f"{source.shards.manifest.folder} {source.shards.split}: {source.shards.tokens:,} tokens, "
                f"{len(source.shards.shards):,} shards, {source.sequences:,} sequences of {self.seq_len:,}{share}"
            )
        return "\n".join(lines)

    def _padding(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Bool of ids' shape: what fills up excerpts, a row's last ends of document but the first of them."""
        trailing = np.flip(np.logical_and.accumulate(np.flip(ids == self.eos_id, 1), 1), 1)
        return trailing & np.pad(trailing[:, :-1], ((0, 0), (1, 0)))

    def _locate(self, step: int, rows: Sequence[int]) -> tuple[IntArray, IntArray]:
        if step < 0 or (len(rows) and not 0 <= min(rows) <= max(rows) < self.global_batch_size):
            raise ValueError(
                f"step {step}, rows {rows}: steps start at 0, rows lie in range({self.global_batch_size}), "
                "the global batch size"
            )
        samples = step * self.global_batch_size + np.asarray(rows, dtype=np.int64)
        source, rank = self._interleave(samples)
        sequence = np.empty_like(rank)
        for i in np.unique(source).tolist():
            mine = source == i
            epoch, place = np.divmod(rank[mine], self.sources[i].sequences)
            sequence[mine] = self._permute(i, epoch, place) if self.shuffle else place
        return source, sequence

    def _permute(self, source: int, epoch: IntArray, place: IntArray) -> IntArray:
        out = np.empty_like(place)
        for e in np.unique(epoch).tolist():  # one, or two where a batch crosses the end of an epoch
            now = epoch == e
            out[now] = self._permutation(source, e)(place[now])
        return out

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.sources[source].sequences, f"seed {self.seed} source {source} epoch {epoch}")

    def _read(self, source: int, sequence: IntArray, step: int, rows: IntArray) -> npt.NDArray[Any]:
        """Sequences (n,) of one source as (n, seq_len) in the shards' own dtype, ids checked."""
        ends, shards, length = self.sources[source].ends, self.sources[source].shards, self.seq_len
        shard = np.searchsorted(ends, sequence, side="right")
        first = np.concatenate([np.zeros(1, np.int64), ends])[shard]
        starts = (sequence - first) * length
        out = np.empty((len(sequence), length), dtype=shards.dtype)
        for i, (index, start) in enumerate(zip(shard.tolist(), starts.tolist())):
            out[i] = shards.array(index)[start : start + length]
        if np.iinfo(shards.dtype).max >= self.vocab_size and out.size and int(out.max()) >= self.vocab_size:
            row, column = (int(x[0]) for x in np.nonzero(out >= self.vocab_size))
            raise InputError(
                f"step {step}, row {int(rows[row])}: token {int(starts[row]) + column} of "
                f"{shards.path(int(shard[row]))} is "
                f"id {int(out[row, column])}, vocab_size is {self.vocab_size}; the shard was altered after its "
                f"manifest was written (train.py --check --deep finds every such place): {REMEDY}"
            )
        return out


def open_loader(
    config: LoaderConfig, *, seq_len: int, global_batch_size: int, seed: int, vocab_size: int,
    tokenizer_sha256: str | None = None, training: bool,
) -> TokenBatches:  # fmt: skip
    """Opens the shard sets of a loader's section and checks them, cheaply: no token is read.

    seq_len in tokens, global_batch_size in sequences; the dataset's shuffle_seed goes before seed. training=False reads
    the "val" split by default and in order. InputError for a folder, shard, id or tokenizer that does not fit.
    """
    section = "train_loader" if training else "eval_loader"
    dataset = config.dataset
    if (dataset.local is None) == (not dataset.mix):
        raise InputError(f"{section}.dataset: give exactly one of local (a folder of token shards) and mix (a list)")
    if dataset.mix and not training:
        raise InputError(
            "eval_loader.dataset.mix: evaluation reads one shard set; name it in eval_loader.dataset.local"
        )
    if config.num_workers < 0:
        raise InputError(f"{section}.num_workers: is {config.num_workers}; give the steps to keep ready, 0 or more")
    split = dataset.split or ("train" if training else "val")
    entries = dataset.mix or [MixEntry(local=str(dataset.local))]
    sources = [_open_source(entry, entry.split or split, seq_len) for entry in entries]
    for i, source in enumerate(sources):
        source.shards.check_ids(vocab_size)
        if tokenizer_sha256 is not None:
            source.shards.check_tokenizer(tokenizer_sha256)
        elif source.shards.manifest.tokenizer_sha256 != sources[0].shards.manifest.tokenizer_sha256:
            raise InputError(
                f"{section}.dataset.mix[{i}]: {source.shards.manifest.folder} and "
                f"{sources[0].shards.manifest.folder} were made with different tokenizers; use one for all"
            )
    if dataset.shuffle_seed is not None:
        seed = dataset.shuffle_seed
    try:
        return TokenBatches(sources, seq_len=seq_len, global_batch_size=global_batch_size, seed=seed,
                            vocab_size=vocab_size, shuffle=dataset.shuffle and training)  # fmt: skip
    except ValueError as error:
        raise InputError(f"{section}.dataset.mix: {error}") from None


def _open_source(entry: MixEntry, split: str, seq_len: int) -> Source:
    shards = ShardSet(entry.local, split)
    excerpt = shards.manifest.excerpt_tokens
    if excerpt is not None and excerpt % seq_len:
        raise InputError(
            f"{shards.manifest.folder}: holds excerpts of {excerpt} tokens, which max_seq_len {seq_len} does not "
            f"divide: set it to {excerpt} or a divisor, or prepare the data with --excerpt-tokens {seq_len}"
        )
    ends = np.cumsum([shard.tokens // seq_len for shard in shards.shards], dtype=np.int64)
    if ends[-1] == 0:
        raise InputError(
            f"{shards.manifest.folder}: no shard of split {split!r} is as long as one sequence: {shards.tokens} tokens "
            f"in {len(shards.shards)} shards, max_seq_len {seq_len}; prepare more text, or "
            "lower max_seq_len (for a finished model: --seq-len)"
        )
    return Source(shards, entry.weight, ends)
