"""MptCache: keys and values of what a model has read, so that each further token is computed once.

Row b keeps its keys from its first real token on, without gaps: position p of row b is column columns - lengths[b] + p
of what was read. Left padding is therefore never kept, and a batch of unequal prompts decodes as ragged rows. Padding
after a row's first real token keeps its place, since ALiBi counts it, and is masked.
"""

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

if TYPE_CHECKING:
    from mpt.model import AttentionRules, MptModel

GRAIN = 64  # keys to a block of key norms; capacities are multiples
DECODED = 16  # queries that decode_attention takes at most
SKIPPING = 1024  # keys below which decoding reads all: on a CPU, finding those that cannot matter costs more


class _Layer(NamedTuple):
    """k and v (B, G, capacity, D), key norms (B, G, capacity / 64) fp32 or None."""

    k: Tensor
    v: Tensor
    norms: Tensor | None


class MptCache:
    """Keys and values (B, G, T, D) of every block, after clip and qk_ln. Grows in place.

    Give an empty one as `past_key_values`, or take the one that a call with use_cache=True returns; every call with it
    adds what it reads. The first call decides batch, dtype, device and model; another of any is a ValueError.

    capacity: positions to make room for at once. Beyond it the room grows by half at least, whenever it is full.
    """

    def __init__(self, capacity: int = 0) -> None:
        if capacity < 0:
            raise ValueError(f"capacity is {capacity}; it must not be negative")
        self.capacity = capacity
        self.columns = 0
        self.lengths: list[int] = []  # by row
        self.mask: Tensor | None = None  # (B, columns) bool, or None where nothing is padding
        self.holes = False  # whether padding is among the keys
        self._layers: dict[int, _Layer] = {}
        self._model: weakref.ref[MptModel] | None = None

    def __len__(self) -> int:
        """The columns that were read, padding included: `past` of a further call."""
        return self.columns

    def __bool__(self) -> bool:
        return True  # an empty cache is a cache

    def get_seq_length(self) -> int:
        """len(self), under transformers' name."""
        return self.columns

    @property
    def batch_size(self) -> int | None:
        """Rows; None before the first call."""
        return len(self.lengths) or None

    def memory(self) -> int:
        """Bytes that it occupies."""
        return sum(t.nbytes for layer in self._layers.values() for t in layer if t is not None)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` columns; their room stays."""
        if not 0 <= length <= self.columns:
            raise ValueError(f"crop({length}): the cache holds {self.columns} columns; give 0 to {self.columns}")
        self.lengths = [max(n - (self.columns - length), 0) for n in self.lengths]
        self.columns = length
        if self.mask is not None:
            self.mask = self.mask[:, :length]
            self.holes = self.holes and _gaps(self.mask, self.lengths)

    def repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row, as torch.repeat_interleave does: to continue a prompt in several ways."""
        for i, (k, v, norms) in self._layers.items():  # one by one: never two caches at once
            k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
            self._layers[i] = _Layer(k, v, None if norms is None else norms.repeat_interleave(repeats, 0))
        self.lengths = [n for n in self.lengths for _ in range(repeats)]
        self.mask = None if self.mask is None else self.mask.repeat_interleave(repeats, 0)

    def begin(self, model: "MptModel", batch: int, new: int, device: torch.device, mask: Tensor | None) -> "CacheStep":
        """What a call on `new` columns (B, new) is about to add. mask: (B, columns + new), or None for new tokens that
        are all real; what was padding stays so. ValueError where batch, device, model or mask do not fit.
        """
        if self._model is not None and self._model() is not model:
            raise ValueError("past_key_values was filled by another model; give each model a cache of its own")
        if not self.lengths:
            self._layers.clear()  # a first call failed
        elif len(self.lengths) != batch:
            raise ValueError(
                f"past_key_values holds {len(self.lengths)} rows and the input has {batch}; start a new MptCache for "
                "another batch"
            )
        if self.lengths and (held := self._layers[0].k.device) != device:
            raise ValueError(f"past_key_values is on {held} and the input on {device}; start a new MptCache")
        past, total = self.lengths or [0] * batch, self.columns + new
        added, holes = [new] * batch, self.holes
        if mask is not None:
            real = mask[:, self.columns :]
            if not real.all():
                first = torch.where(real.any(1), real.int().argmax(1), new).tolist()
                added = [new if p else new - f for p, f in zip(past, first)]
            if self.mask is not None:
                self._check_dropped(mask)
            holes = _gaps(mask, [p + n for p, n in zip(past, added)])
            mask = None if not holes and all(p + n == total for p, n in zip(past, added)) else mask
        elif self.mask is not None:
            mask = torch.cat((self.mask, self.mask.new_ones(batch, new)), 1)
        return CacheStep(self, model, new, past, added, mask, holes, device)

    def _check_dropped(self, mask: Tensor) -> None:
        """Left padding is not kept: a mask cannot make it real afterwards."""
        before = torch.tensor([self.columns - n for n in self.lengths], device=mask.device)
        back = mask[:, : self.columns] & (torch.arange(self.columns, device=mask.device) < before[:, None])
        if back.any():
            row, column = back.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask calls column {column} of row {row} real; it was left padding when past_key_values "
                "read it, and is not kept: give the mask of that call, with the new columns appended"
            )

    def room(self, index: int, k: Tensor, length: int, norms: bool) -> _Layer:
        """Layer `index` with space for `length` keys; k (B, S, G, D) says the rest of its shape."""
        b, _, g, d = k.shape
        layer = self._layers.get(index)
        held = 0 if layer is None else layer.k.shape[2]
        if layer is not None and layer.k.dtype != k.dtype:
            raise ValueError(
                f"past_key_values holds {layer.k.dtype} and the model now computes keys in {k.dtype}; keep to one "
                "dtype and autocast setting, or start a new MptCache"
            )
        if layer is not None and held >= length:
            return layer
        size = max(length, self.capacity if layer is None else held + held // 2)
        size = -(-size // GRAIN) * GRAIN
        grown = _Layer(
            k.new_empty(b, g, size, d),
            k.new_empty(b, g, size, d),
            k.new_empty(b, g, size // GRAIN, dtype=torch.float32) if norms else None,
        )
        if layer is not None:
            for old, new in zip(layer, grown):
                if old is not None and new is not None:
                    new[:, :, : old.shape[2]] = old
        self._layers[index] = grown
        return grown


class CacheStep:
    """One forward call's part of a cache: how many keys each row had, how many it gets, and what the masks leave of it.

    Nothing of it counts before `commit`: a call that fails leaves the cache as it was.
    """

    def __init__(
        self,
        cache: MptCache,
        model: "MptModel",
        columns: int,
        past: list[int],
        added: list[int],
        mask: Tensor | None,
        holes: bool,
        device: torch.device,
    ) -> None:
        self.cache, self.model, self.past, self.added, self.mask, self.holes = cache, model, past, added, mask, holes
        self.before, self.columns = cache.columns, columns
        self.lengths = [p + n for p, n in zip(past, added)]
        self.full = all(n == columns for n in added)  # no row is still in its left padding
        self.starts = torch.tensor(past, device=device)
        self.ends = torch.tensor(self.lengths, device=device)
        self.groups = _runs(list(zip(past, added)))

    def layer(self, index: int) -> "LayerStep":
        """What the attention of block `index` is given."""
        return LayerStep(self, index)

    def commit(self) -> None:
        """All blocks have run: what they added counts."""
        cache = self.cache
        cache.columns, cache.lengths = self.before + self.columns, self.lengths
        cache.mask, cache.holes = self.mask, self.holes
        cache._model = weakref.ref(self.model)


class LayerStep:
    """One block's part of a CacheStep."""

    def __init__(self, step: CacheStep, index: int) -> None:
        self.step, self.index = step, index

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rules: "AttentionRules", softmax_scale: float | None, dropout_p: float
    ) -> Tensor:
        """Adds k and v (B, S, G, D) to the cache, and attends from q (B, S, H, D) to all of it: (B, S, H, D).

        The masks of `rules` are (B, past + S). Gradients reach this call's k and v, not those of earlier calls.
        """
        step = self.step
        layer = step.cache.room(self.index, k, max(step.lengths, default=0), rules.alibi_slopes is not None)
        self._write(layer, k.detach(), v.detach())
        shared: dict[str, Any] = {"alibi_slopes": rules.alibi_slopes, "softmax_scale": softmax_scale}
        if step.before == 0:
            masks = _masks(rules, rules.attention_mask, slice(None), 0)
            return kernels.flash_attention(q, k, v, **shared, **masks, dropout_p=dropout_p)  # type: ignore[return-value]
        graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        plain = rules.sequence_id is None and not step.holes and (rules.prefix_mask is None or q.shape[1] == 1)
        if plain and step.full and q.shape[1] <= DECODED and q.shape[-1] <= 256 and not (graph or dropout_p):
            longest = max(step.lengths)
            norms = None if layer.norms is None or longest < SKIPPING else layer.norms[:, :, : -(-longest // GRAIN)]
            return kernels.decode_attention(  # type: ignore[return-value]
                q, layer.k[:, :, :longest], layer.v[:, :, :longest], step.ends, **shared, key_norms=norms
            )
        parts = []
        for i, j, past, added in step.groups:
            rows, pad, end = slice(i, j), step.columns - added, past + added
            if added == 0:
                parts.append(torch.zeros_like(q[rows]))
                continue
            keys, values = (
                torch.cat((held[rows, :, :past].transpose(1, 2), fresh[rows, pad:]), 1)
                if graph
                else held[rows, :, :end].transpose(1, 2)
                for held, fresh in ((layer.k, k), (layer.v, v))
            )
            masks = _masks(rules, rules.attention_mask if step.holes else None, rows, step.before + step.columns - end)
            out: Any = kernels.flash_attention(
                q[rows, pad:], keys, values, **shared, **masks, query_offset=past, dropout_p=dropout_p
            )
            parts.append(F.pad(out, (0, 0, 0, 0, pad, 0)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def keys(self) -> Tensor:
        """All keys by column, (B, past + S, G, D): zeros where left padding was. After `attend`."""
        step, held = self.step, self.step.cache._layers[self.index].k
        out = held.new_zeros(held.shape[0], step.before + step.columns, held.shape[1], held.shape[3])
        for row, end in enumerate(step.lengths):
            out[row, out.shape[1] - end :] = held[row, :, :end].transpose(0, 1)
        return out

    def _write(self, layer: _Layer, k: Tensor, v: Tensor) -> None:
        step = self.step
        if step.full and len(step.groups) > 1:  # ragged rows: one call for all of them
            at = step.starts[:, None] + torch.arange(step.columns, device=k.device)
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            layer.k[rows, :, at], layer.v[rows, :, at] = k, v
        else:
            for i, j, past, added in step.groups:
                pad, end = step.columns - added, past + added
                layer.k[i:j, :, past:end] = k[i:j, pad:].transpose(1, 2)
                layer.v[i:j, :, past:end] = v[i:j, pad:].transpose(1, 2)
        if layer.norms is None or max(step.lengths) < SKIPPING:
            return
        if max(step.past) < SKIPPING:  # none were taken so far
            for i, j, past, added in step.groups:
                kernels.update_key_norms(layer.norms[i:j], layer.k[i:j, :, : past + added], 0)
        elif step.full:
            kernels.update_key_norms(layer.norms, k.transpose(1, 2), step.starts)
        else:
            for i, j, _, added in step.groups:
                new = k[i:j, step.columns - added :].transpose(1, 2)
                kernels.update_key_norms(layer.norms[i:j], new, step.starts[i:j])


def _masks(rules: "AttentionRules", attention_mask: Tensor | None, rows: slice, column: int) -> dict[str, Any]:
    """flash_attention's masks for some rows and the keys from a column on."""
    given = {"attention_mask": attention_mask, "sequence_id": rules.sequence_id, "prefix_mask": rules.prefix_mask}
    return {name: None if mask is None else mask[rows, column:] for name, mask in given.items()}


def _gaps(mask: Tensor, lengths: list[int]) -> bool:
    """Whether padding is among the last lengths[b] columns of any row of mask (B, columns)."""
    first = mask.shape[1] - torch.tensor(lengths, device=mask.device)
    return bool((~mask & (torch.arange(mask.shape[1], device=mask.device) >= first[:, None])).any())


def _runs(rows: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """(i, j, past, added): neighbouring rows i..j that have as many keys and get as many."""
    runs: list[tuple[int, int, int, int]] = []
    for i, (past, added) in enumerate(rows):
        if runs and runs[-1][2:] == (past, added):
            runs[-1] = (runs[-1][0], i + 1, past, added)
        else:
            runs.append((i, i + 1, past, added))
    return runs
