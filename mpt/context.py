"""Context parallelism: the ranks of a group share every sequence, and fetch from one another the keys that can matter.

A sequence is cut into blocks of equal length, and each rank takes the same number of them, so that all have the same
tokens and nearly the same attention to do: work per block grows along the sequence as far as ALiBi lets a head see, and
starts anew with every packed document. Norms, MLP, embedding and loss see a rank's tokens only. In attention

1. ranks agree on the largest norm of each few keys (a maximum over the group), from which
2. each rank derives, per kv head, the first key that its queries can still need: those before it weigh at most 2^-24 of
   any row's total (kernels.alibi.first_kept), and tells the others;
3. one exchange brings it exactly the keys and values it needs, and attention runs on each block of queries with one
   range of keys. Keys of that range that this head does not need are zeros; by the same bound they weigh nothing.

In the backward the gradients of fetched keys and values travel back, and their owners add them up in rank order: the
results repeat themselves.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import kernels
from kernels.alibi import Rules, block_norms, first_kept
from kernels.backend import autocast_dtype, no_autocast, wide
from mpt.config import MptConfig

__all__ = ["ContextGroup", "ContextSplit", "Needs", "deal", "slopes_of"]

Block = tuple[int, int]  # positions first..last, last excluded

_BLOCKS = (1, 2, 4, 8, 16)  # per rank; fewer mean fewer borders, over which keys travel
_SHORTEST = 64  # tokens of a block where a rank has more than two
_BALANCED = 1.18  # expected balance that is good enough not to cut finer
# Slope x distance of the last key that is kept: 24 ln 2, and what scores add at the start and far into a training.
_REACHES = (17.0, 30.0, 60.0)


def slopes_of(config: MptConfig) -> Tensor | None:
    """ALiBi's slopes (H,) of a model, None without."""
    attn = config.attn_config
    return kernels.alibi_slopes(config.n_heads, attn.alibi_bias_max) if attn.alibi else None


class ContextGroup:
    """The ranks that share sequences, this process among them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def split(
        self,
        length: int,
        *,
        alibi_slopes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
    ) -> "ContextSplit":
        """How this group shares sequences of `length` tokens: the same on every rank, and for every layer.

        alibi_slopes (H,); attention_mask and sequence_id, each (B, length), whole on every rank: those that the model
        gets. sequence_id only where attention uses it. ValueError if there are fewer tokens than ranks.
        """
        first = _first_visible(attention_mask, sequence_id)
        blocks, _ = deal(length, self.size, alibi_slopes, first)
        return ContextSplit(self, length, blocks, first, documents=sequence_id is not None)


class ContextSplit:
    """This rank's part of a batch of sequences of `length` tokens. `blocks[r]`: those of rank r, in order. `documents`:
    whether it relies on tokens seeing their own sequence_id only.

    A class of its own and no dataclass: see mpt.model.AttentionRules.
    """

    def __init__(
        self, context: ContextGroup, length: int, blocks: list[list[Block]], first: Tensor | None, *, documents: bool
    ) -> None:
        self.context, self.length, self.blocks, self._first = context, length, blocks, first
        self.documents = documents
        self.mine = blocks[context.rank]

    def take(self, x: Tensor, dim: int = 1, rank: int | None = None) -> Tensor:
        """The positions of x along `dim` that are this rank's (or another's), one block after the other."""
        blocks = self.mine if rank is None else self.blocks[rank]
        return torch.cat([x.narrow(dim, first, last - first) for first, last in blocks], dim)

    @torch.compiler.disable
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        alibi_slopes: Tensor | None = None,
        softmax_scale: float | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """kernels.flash_attention, causal, for this rank's q (B, own, H, D) against every rank's k, v (B, own, G, D).

        Collective. The masks are over the whole sequences, (B, S). Returns (B, own, H, D). Dropout draws its seeds from
        torch's generator, which should differ between ranks. prefix_mask is refused: its keys lie on both sides.
        """
        if prefix_mask is not None:
            raise ValueError("prefix_mask does not work where ranks share sequences (context); leave it out")
        if (dtype := autocast_dtype(q)) is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        needs = self.needs(
            *(q, k),
            alibi_slopes=alibi_slopes,
            softmax_scale=softmax_scale,
            attention_mask=attention_mask,
            sequence_id=sequence_id,
        )
        fetched = _Fetch.apply(k, v, needs)
        parts, begin = [], 0
        for (first, last), low, keys, values in zip(self.mine, needs.lows, fetched[::2], fetched[1::2]):
            end = begin + last - first
            out: Any = kernels.flash_attention(
                q[:, begin:end],
                keys,
                values,
                alibi_slopes=alibi_slopes,
                softmax_scale=softmax_scale,
                attention_mask=_columns(attention_mask, low, last),
                sequence_id=_columns(sequence_id, low, last),
                query_offset=first - low,
                dropout_p=dropout_p,
            )
            parts.append(out)
            begin = end
        return torch.cat(parts, 1)

    @torch.no_grad()
    def needs(
        self,
        q: Tensor,
        k: Tensor,
        *,
        alibi_slopes: Tensor | None = None,
        softmax_scale: float | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
    ) -> "Needs":
        """The first key that each block of queries can need, of every rank. Collective; arguments as of `attention`."""
        groups = k.shape[2]
        if alibi_slopes is None:
            starts = torch.zeros(len(self.mine), groups * q.shape[0], dtype=torch.int64, device=q.device)
        else:
            with no_autocast(q):
                scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
                starts = self._first_kept(q, k, alibi_slopes, scale, attention_mask, sequence_id)
        for (first, last), start in zip(self.mine, starts):
            if self._first is not None:
                start.clamp_(min=self._first[:, first:last].amin(1).to(start).repeat(groups))
            start.clamp_(max=first)  # a block has its own keys in any case
        everyone = starts.new_empty((self.context.size * len(self.mine), starts.shape[1]))
        dist.all_gather_into_tensor(everyone, starts, group=self.context.group)
        return Needs(self, q.shape[0], everyone.view(self.context.size, len(self.mine), -1))

    def _first_kept(
        self, q: Tensor, k: Tensor, slopes: Tensor, scale: float, attention_mask: Tensor | None, ids: Tensor | None
    ) -> Tensor:
        """(blocks of this rank, kv heads x batch) int64."""
        batch, groups, up = q.shape[0], k.shape[2], wide(q.dtype)
        keys = k.permute(2, 0, 1, 3).flatten(0, 1)
        queries = q.unflatten(2, (groups, -1)).permute(2, 0, 3, 1, 4).flatten(0, 1).to(up) * scale
        slopes = slopes.view(groups, 1, -1).expand(-1, batch, -1).flatten(0, 1)
        norms = block_norms(keys, self.take(torch.arange(self.length, device=k.device), dim=0), self.length)
        dist.all_reduce(norms, dist.ReduceOp.MAX, group=self.context.group)
        starts, begin = [], 0
        for first, last in self.mine:
            end = begin + last - first
            masks = _columns(attention_mask, first, last), _columns(ids, first, last)
            found = first_kept(
                queries[:, :, begin:end],
                keys[:, begin:end],
                slopes,
                Rules(True, None, 0, *masks, None),
                chunk=last - first,
                bits=53 if up == torch.float64 else 24,
                position=first,
                norms=norms,
            )
            starts.append(found.amin((1, 2)))
            begin = end
        return torch.stack(starts).long()


class _Place(NamedTuple):
    """Rows of k (B, T, G, D): their indices in the first three dimensions."""

    batch: Tensor
    position: Tensor
    head: Tensor


class Needs:
    """Which keys each rank needs in one attention. starts: (ranks, blocks of each, kv heads x batch), batch last."""

    def __init__(self, split: ContextSplit, batch: int, starts: Tensor) -> None:
        self.split, self.batch, self.starts = split, batch, starts
        self.lows: list[int] = starts[split.context.rank].amin(1).tolist()  # by block, over heads
        self.low = min(self.lows)

    def send(self) -> list[_Place]:
        """For each rank, the rows of this rank's keys that it needs."""
        me, split = self.split.context.rank, self.split
        return [self._rows(split.take(self._wanted(r)), r == me) for r in range(split.context.size)]

    def receive(self) -> list[_Place]:
        """From each rank, where the rows that it sends belong among the keys from `low` on."""
        me, split, wanted = self.split.context.rank, self.split, self._wanted(self.split.context.rank)
        place = torch.arange(split.length, device=wanted.device) - self.low
        rows = [self._rows(split.take(wanted, rank=r), r == me) for r in range(split.context.size)]
        return [row._replace(position=split.take(place, 0, r)[row.position]) for r, row in enumerate(rows)]

    def _wanted(self, rank: int) -> Tensor:
        """Bool (kv heads x batch, S): the keys that some block of a rank reads."""
        place = torch.arange(self.split.length, device=self.starts.device)
        wanted = torch.zeros(self.starts.shape[-1], self.split.length, dtype=torch.bool, device=place.device)
        for (_, last), start in zip(self.split.blocks[rank], self.starts[rank]):
            wanted |= (place >= start[:, None]) & (place < last)
        return wanted

    def _rows(self, wanted: Tensor, own: bool) -> _Place:
        folded, position = (wanted[:0] if own else wanted).nonzero(as_tuple=True)
        return _Place(folded % self.batch, position, folded // self.batch)


class _Fetch(torch.autograd.Function):
    """k, v (B, own, G, D) -> keys and values of each of this rank's blocks in turn, (B, last - low, G, D): what is
    needed, zeros elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, needs: Needs) -> tuple[Tensor, ...]:
        ctx.needs, ctx.shape = needs, k.shape
        split, low = needs.split, needs.low
        send, receive = needs.send(), needs.receive()
        at = _joined(send)
        came = _exchange(torch.stack((k[at], v[at]), 1), send, receive, split.context)
        at, high = _joined(receive), max(last for _, last in split.mine)
        found = []
        for x, rows in zip((k, v), came.unbind(1)):
            whole = x.new_zeros((x.shape[0], high - low, *x.shape[2:]))
            begin = 0
            for first, last in split.mine:
                whole[:, first - low : last - low] = x[:, begin : begin + last - first]
                begin += last - first
            whole[at] = rows
            found.append(whole)
        blocks = zip(split.mine, needs.lows)
        return tuple(x[:, start - low : last - low] for (_, last), start in blocks for x in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        needs: Needs = ctx.needs
        split, low = needs.split, needs.low
        send, receive = needs.send(), needs.receive()
        high = max(last for _, last in split.mine)
        whole = []
        for parts in (grads[::2], grads[1::2]):
            total = parts[0].new_zeros((ctx.shape[0], high - low, *ctx.shape[2:]))
            for (_, last), start, part in zip(split.mine, needs.lows, parts):
                total[:, start - low : last - low] += part
            whole.append(total)
        at = _joined(receive)
        came = _exchange(torch.stack([x[at] for x in whole], 1), receive, send, split.context)
        mine = [(first - low, last - low) for first, last in split.mine]
        dk, dv = (torch.cat([x[:, a:b] for a, b in mine], 1).to(wide(x.dtype)) for x in whole)
        for rows, part in zip(send, came.split([len(row.head) for row in send])):
            dk[rows] += part[:, 0]  # rank by rank: a key may go to several, but to each once
            dv[rows] += part[:, 1]
        return dk.to(grads[0].dtype), dv.to(grads[0].dtype), None


def _columns(mask: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if mask is None else mask[:, first:last]


def _joined(places: list[_Place]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*places))


def _exchange(rows: Tensor, send: list[_Place], receive: list[_Place], context: ContextGroup) -> Tensor:
    """Send `rows`, those of rank 0 first, and return what comes, in the same order."""
    there, here = ([len(row.head) for row in places] for places in (send, receive))
    came = rows.new_empty((sum(here), *rows.shape[1:]))
    dist.all_to_all_single(came, rows.contiguous(), here, there, group=context.group)
    return came


# ---- who takes what --------------------------------------------------------------------------------------------------


def deal(
    length: int, size: int, alibi_slopes: Tensor | None = None, first: Tensor | None = None
) -> tuple[list[list[Block]], float]:
    """Blocks of a sequence for each of `size` ranks, and the expected balance: the most attention work of a rank over
    the mean. The coarsest cut that is expected to be balanced however far scores let heads see, or else the best.

    alibi_slopes (H,): how far heads see. first (B, length): the first key that each query sees (None: the very first).
    """
    if length < size:
        raise ValueError(f"a sequence of {length} tokens cannot be shared by {size} ranks; give each at least one")
    works = [_expected_work(length, alibi_slopes, first, reach) for reach in _REACHES]
    sums = torch.nn.functional.pad(torch.stack(works).cumsum(1), (1, 0))
    best: tuple[list[list[Block]], float] | None = None
    for count in _BLOCKS:
        if length < count * size * (1 if count <= 2 else _SHORTEST):
            break
        cuts = [i * length // (count * size) for i in range(count * size + 1)]
        loads = sums[:, cuts].diff()
        parts = _deal(loads[1].tolist(), size)
        worst = max(_balance([sum(load[i] for i in part) for part in parts]) for load in loads.tolist())
        if best is None or worst < best[1]:
            best = [[(cuts[i], cuts[i + 1]) for i in part] for part in parts], worst
        if best[1] <= _BALANCED:
            break
    assert best is not None
    return best


def _balance(loads: list[float]) -> float:
    return max(loads) * len(loads) / max(sum(loads), 1e-30)


def _deal(work: list[float], size: int) -> list[list[int]]:
    """Blocks by rank: the heaviest first, each to the rank with least work among those that still lack blocks."""
    each = len(work) // size
    parts: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        rank = min((r for r in range(size) if len(parts[r]) < each), key=lambda r: (loads[r], r))
        parts[rank].append(i)
        loads[rank] += work[i]
    return [sorted(part) for part in parts]


def _expected_work(length: int, alibi_slopes: Tensor | None, first: Tensor | None, reach: float) -> Tensor:
    """(length,) float64: the keys that each query reads, over heads and batch, if heads see as far as reach / slope."""
    away = torch.arange(length, dtype=torch.float64)
    if alibi_slopes is None:
        reaching = torch.ones_like(away)
    else:
        windows = (reach / alibi_slopes.double().cpu()).sort().values
        reaching = (len(windows) - torch.searchsorted(windows, away)).double()
    by_distance = torch.nn.functional.pad(reaching.cumsum(0), (1, 0))  # keys read by a query with so many before it
    place = torch.arange(1, length + 1)
    seen = place if first is None else (place - first.cpu()).clamp(min=0)
    work = by_distance[seen]
    return work if first is None else work.sum(0)


def _first_visible(attention_mask: Tensor | None, sequence_id: Tensor | None) -> Tensor | None:
    """(B, S): the first key that each query sees, S where there is none; None without masks."""
    if sequence_id is not None:
        given = sequence_id
    elif attention_mask is not None:
        given = torch.zeros_like(attention_mask, dtype=torch.int64)
    else:
        return None
    visible = given >= 0 if attention_mask is None else (given >= 0) & attention_mask.bool()
    values, index = given.unique(return_inverse=True)
    length = given.shape[1]
    place = torch.arange(length, device=given.device).expand(given.shape).masked_fill(~visible, length)
    firsts = place.new_full((given.shape[0], len(values)), length).scatter_reduce_(1, index, place, "amin")
    return firsts.gather(1, index).masked_fill(given < 0, length)
