"""Batches of examples for fine-tuning: laid into sequences, in an order that only the seed and the step decide."""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data import order
from trainer.data.config import DatasetConfig, LoaderConfig
from trainer.data.examples import Encoder, Examples, read_examples, told
from trainer.data.order import IntArray, Permutation
from trainer.data.packing import PADDING, Layout, first_fit_decreasing, one_each
from trainer.data.sources import HUB, ROWS, InputFile, list_files
from trainer.data.templates import Template
from trainer.errors import InputError

IGNORED = -100  # the label of a token that does not count in the loss
WINDOW = 64  # global batches of which the examples are sorted by length, without packing
ROUND = 64  # a batch is cut to its longest row, rounded up to this many tokens, so that few shapes occur

Planes = npt.NDArray[np.int64]  # (rows, 3, seq_len): token ids, labels, sequence ids


class ExampleBatches:
    """Sequences of up to `seq_len` tokens, of one example or of several packed together, in a seeded order.

    Sample g = step * global_batch_size + row belongs to epoch g // sequences; an epoch reads every sequence once, and
    batches run across its end. Packed sequences come in a permutation of their own per epoch. Unpacked ones as well,
    but then sorted by length within windows of WINDOW global batches, and the batches of a window shuffled: the rows of
    a batch have similar lengths, and little is spent on padding. Nothing depends on the world size.
    """

    def __init__(
        self, examples: Examples, layout: Layout, *, name: str, eos_id: int, seq_len: int, global_batch_size: int,
        seed: int, shuffle: bool, packed: bool, training: bool,
    ) -> None:  # fmt: skip
        self.examples, self.layout, self.name, self.eos_id = examples, layout, name, eos_id
        self.seq_len, self.global_batch_size, self.seed = seq_len, global_batch_size, seed
        self.shuffle, self.packed, self.training = shuffle, packed, training
        self.sequences = len(layout)
        self.steps_per_epoch = max(1, self.sequences // global_batch_size)
        self.mean_tokens = len(examples.ids) / self.sequences
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, step: int, rows: Sequence[int]) -> Planes:
        """Rows `rows` of global batch `step` >= 0 as int64 (len(rows), 3, seq_len): token ids, labels, sequence ids."""
        if step < 0 or (len(rows) and not 0 <= min(rows) <= max(rows) < self.global_batch_size):
            raise ValueError(f"step {step}, rows {rows}: rows lie in range({self.global_batch_size}), steps from 0 on")
        samples = step * self.global_batch_size + np.asarray(rows, dtype=np.int64)
        places = [divmod(sample, self.sequences) for sample in samples.tolist()]
        return self._planes([int(self._epoch(epoch)[place]) if self.shuffle else place for epoch, place in places])

    def eval_batches(
        self, rank: int, world: int, batch_size: int, sequences: int | None = None
    ) -> Iterator[tuple[Planes, int]]:
        """Every sequence once, in order, dealt to the ranks; as TokenBatches.eval_batches."""
        end = self.sequences if sequences is None else min(sequences, self.sequences)
        for start in range(0, end, world * batch_size):
            places = start + rank * batch_size + np.arange(batch_size, dtype=np.int64)
            yield self._planes(np.minimum(places, end - 1).tolist()), int((places < end).sum())

    def arguments(self, planes: Planes, *, sequence_id: bool, prefix_mask: bool) -> dict[str, npt.NDArray[Any]]:
        """Arguments of the model's forward for rows of `batch`, cut to the longest of them.

        sequence_id: whether the model takes sequence ids. prefix_mask: whether it takes a prefix, the prompts then.
        Padding is on the right, where no token sees it, so no attention mask is needed.
        """
        longest = int((planes[:, 2] != PADDING).sum(1).max(initial=1))
        planes = planes[:, :, : min(self.seq_len, -(-longest // ROUND) * ROUND)]
        ids, labels, sequences = (np.ascontiguousarray(planes[:, i]) for i in range(3))
        out: dict[str, npt.NDArray[Any]] = {"input_ids": ids, "labels": labels}
        if sequence_id:
            out["sequence_id"] = sequences
        if prefix_mask:
            out["prefix_mask"] = (labels == IGNORED) & (sequences != PADDING)
        return out

    def tokens(self, planes: Planes) -> int:
        """Tokens in rows of `batch`, padding aside."""
        return int((planes[:, 2] != PADDING).sum())

    def fingerprint(self) -> dict[str, Any]:
        """What decides the order and content of the samples, as JSON values: a resumed run compares it."""
        digest = hashlib.sha256()
        for array in (self.examples.ids, self.examples.trained, self.layout.examples, self.layout.starts):
            digest.update(array.tobytes())
        return {"order": order.VERSION, "seq_len": self.seq_len, "seed": self.seed, "shuffle": self.shuffle,
                "packing": self.packed, "examples": len(self.examples), "digest": digest.hexdigest()}  # fmt: skip

    def description(self) -> str:
        """Lines for people: what was read, what was left out, and how much of the sequences is no padding."""
        e = self.examples
        lines = [
            f"{self.name}: {len(e):,} of {e.read:,} examples, {len(e.ids):,} tokens, "
            f"{e.trained.mean():.1%} of them in responses"
        ]
        if e.cut or e.dropped:
            places = told({"cut": e.cut, "dropped": e.dropped, "silent": e.silent})
            lines.append(f"too long: {places.replace(f'{self.name}, ', '')}")
        if self.packed:
            lines.append(
                f"packed into {self.sequences:,} sequences of {self.seq_len:,}, {len(e) / self.sequences:.1f} examples "
                f"in each: token efficiency {len(e.ids) / (self.sequences * self.seq_len):.2%}"
            )
        elif self.training:
            lines.append(f"one example in a sequence: token efficiency {self._efficiency():.2%}, in batches by length")
        return "\n".join(lines)

    def sample_prompt(self, i: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Example i's tokens up to its first response, and that response's."""
        ids, trained = self.examples.of(i)
        start = int(trained.argmax())
        rest = ~trained[start:]
        stop = start + int(rest.argmax()) if rest.any() else len(ids)
        return ids[:start], ids[start:stop]

    def _efficiency(self) -> float:
        """Share of real tokens in the global batches of the first epoch, each cut to its longest row."""
        lengths = self.examples.lengths[self._epoch(0)] if self.shuffle else self.examples.lengths
        starts = np.arange(0, len(lengths), self.global_batch_size)
        rows = np.diff(starts, append=len(lengths))
        return float(lengths.sum() / (np.maximum.reduceat(lengths, starts) * rows).sum())

    def _make_epoch(self, epoch: int) -> IntArray:
        """The sequence at every place of an epoch."""
        permutation = Permutation(self.sequences, f"seed {self.seed} source 0 epoch {epoch}")
        out = permutation(np.arange(self.sequences, dtype=np.int64))
        return out if self.packed else self._by_length(out, epoch)

    def _by_length(self, sequences: IntArray, epoch: int) -> IntArray:
        """The whole global batches of an epoch regrouped by length, window by window; what it shares with its
        neighbours' batches stays in place."""
        size, lengths = self.global_batch_size, self.examples.lengths
        first = -epoch * self.sequences % size  # places that complete the last epoch's batch
        batches = max(0, self.sequences - first) // size
        out = sequences.copy()
        for start in range(0, batches, WINDOW):
            count = min(WINDOW, batches - start)
            window = slice(first + start * size, first + (start + count) * size)
            ordered = sequences[window][np.argsort(lengths[sequences[window]], kind="stable")]
            shuffled = Permutation(count, f"seed {self.seed} epoch {epoch} batch {start}")(np.arange(count))
            out[window] = ordered.reshape(count, size)[shuffled].reshape(-1)
        return out

    def _planes(self, sequences: Sequence[int]) -> Planes:
        out = np.empty((len(sequences), 3, self.seq_len), dtype=np.int64)
        out[:, 0], out[:, 1], out[:, 2] = self.eos_id, IGNORED, PADDING
        for row, sequence in enumerate(sequences):
            place = 0
            for number, example in enumerate(self.layout.of(sequence).tolist()):
                ids, trained = self.examples.of(example)
                part = slice(place, place + len(ids))
                out[row, 0, part], out[row, 2, part] = ids, number
                out[row, 1, part] = np.where(trained, ids.astype(np.int64), IGNORED)
                out[row, 1, place] = IGNORED  # its logits would come from the example before
                place += len(ids)
        return out


def open_examples(
    config: LoaderConfig, *, seq_len: int, global_batch_size: int, seed: int, vocab_size: int, tokenizer: Path,
    training: bool,
) -> ExampleBatches:  # fmt: skip
    """Reads and tokenises all examples of a loader's section of `name: finetuning`, and lays them into sequences.

    The arguments are those of open_loader. InputError names the field, or file and line of the example, that cannot be
    used.
    """
    section, dataset = "train_loader" if training else "eval_loader", config.dataset
    encoder = Encoder(tokenizer)
    try:
        template = Template(dataset.template, dataset.fields, dataset.system_prompt)
    except ValueError as error:
        raise InputError(f"{section}.dataset.{error}") from None
    files, name = _find(dataset, section, training)
    examples = read_examples(files, template, encoder, seq_len=seq_len, cut=dataset.too_long == "cut")
    if (largest := int(examples.ids.max())) >= vocab_size:
        given, own = (name, "tokens of the model's") if examples.form == "tokens" else (tokenizer, "the model's own")
        raise InputError(
            f"{given}: gives token id {largest}, vocab_size is {vocab_size}; take {own} tokenizer, or set vocab_size "
            f"to at least {largest + 1}"
        )
    layout = first_fit_decreasing(examples.lengths, seq_len) if dataset.packing else one_each(len(examples))
    return ExampleBatches(
        examples, layout, name=name, eos_id=encoder.eos_id, seq_len=seq_len, global_batch_size=global_batch_size,
        seed=seed if dataset.shuffle_seed is None else dataset.shuffle_seed, shuffle=dataset.shuffle and training,
        packed=dataset.packing, training=training,
    )  # fmt: skip


def _find(dataset: DatasetConfig, section: str, training: bool) -> tuple[list[InputFile], str]:
    """The files of a data set, and what to call it. A hub data set's split is train, or test for evaluation, unless one
    is named.
    """
    if (dataset.local is None) == (dataset.hf_name is None):
        raise InputError(
            f"{section}.dataset: give exactly one of local (a file, folder or glob) and hf_name (a hub data set)"
        )
    if dataset.local is not None:
        if not Path(dataset.local).exists() and not glob.has_magic(dataset.local):
            raise InputError(
                f"{section}.dataset.local={dataset.local}: no such file or folder; a hub data set is named in hf_name"
            )
        name = dataset.local if dataset.split is None else f"{dataset.local} {dataset.split}"
        return _local_files(Path(dataset.local), dataset.split, section), name
    assert dataset.hf_name is not None
    match = HUB.fullmatch(dataset.hf_name)
    if match is None or Path(dataset.hf_name).exists():
        raise InputError(
            f"{section}.dataset.hf_name={dataset.hf_name} is no hub data set NAME[:CONFIG][@SPLIT]; "
            f"name files and folders in {section}.dataset.local"
        )
    name = (
        dataset.hf_name if match["split"] else f"{dataset.hf_name}@{dataset.split or ('train' if training else 'test')}"
    )
    return list_files([name]), name


def _local_files(local: Path, split: str | None, section: str) -> list[InputFile]:
    """The files with examples behind a path or glob. A split is the subfolder of that name, or the files whose names
    begin with it.
    """
    if split is not None and (local / split).is_dir():
        local, split = local / split, None
    files = list_files([str(local)])
    if local.is_dir():  # where a README.md may lie beside them
        files = [file for file in files if file.kind in ROWS]
    if split is not None:
        files = [file for file in files if file.path.name.split(".")[0].split("-")[0] == split]
    if not files and local.is_file():
        raise InputError(
            f"{section}.dataset.local={local} is one file, and its name does not begin with {section}.dataset.split="
            f"{split}; to take all of it set split to null"
        )
    if not files:
        named = f" named {split}.jsonl, {split}-00000.parquet or the like, and no folder {split}" if split else ""
        raise InputError(f"{section}.dataset.local={local}: no JSON lines, Parquet or Arrow file in it{named}")
    return files
