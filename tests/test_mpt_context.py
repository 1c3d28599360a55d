"""Sequences shared by several ranks: loss and gradients are one rank's, far keys stay where they are, work is balanced.

The checks on ranks are plain functions `ranks_*`, run in one launch per world size and reported one by one.
"""

import json
import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import kernels
from kernels.alibi import Rules, first_kept
from mpt import MptConfig, MptForCausalLM
from mpt.context import Block, ContextGroup, ContextSplit, Needs, deal, slopes_of
from mpt.initialize import init_weights

SHAPE: dict[str, Any] = {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 101, "max_seq_len": 700}


def build(**fields: Any) -> MptForCausalLM:
    model = MptForCausalLM(MptConfig.from_dict(SHAPE | fields))
    init_weights(model, 5)
    for name, p in model.named_parameters():
        if "Wqkv.weight" in name:
            p.data *= 8  # attention that looks at something
    return model.train()


def batch_of(length: int, *, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 101, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, length // 3 : length // 3 + 2] = -100
    return {"input_ids": ids, "labels": labels}


def queries_and_keys(length: int, heads: int, d: int = 64) -> tuple[Tensor, Tensor]:
    """(1, length, heads, d) each, the same on every rank."""
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(1, length, heads, d, generator=generator) for _ in range(2))
    return q, k


def documents(length: int, lengths: list[list[int]]) -> Tensor:
    """Sequence ids for documents of the given lengths by row, the rest padding (-1)."""
    ids = torch.full((len(lengths), length), -1)
    for row, sizes in zip(ids, lengths):
        filled = [i for i, size in enumerate(sizes) for _ in range(size)]
        row[: len(filled)] = torch.tensor(filled)
    return ids


def of_masks(model: MptForCausalLM, context: ContextGroup, batch: dict[str, Tensor]) -> ContextSplit:
    masks = {name: batch.get(name) for name in ("attention_mask", "sequence_id")}
    return context.split(batch["input_ids"].shape[1], alibi_slopes=slopes_of(model.config), **masks)


def gradients(model: MptForCausalLM, batch: dict[str, Tensor], **extra: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, return_logits=False, **extra).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def exchanged(needs: Needs) -> float:
    """The keys that this rank fetches, as a share of those that the other ranks have."""
    count = sum(len(row.head) for row in needs.receive())
    own = sum(last - first for first, last in needs.split.mine)
    return count / (needs.starts.shape[-1] * (needs.split.length - own))


def assert_equal_to_one_rank(model: MptForCausalLM, batch: dict[str, Tensor]) -> ContextSplit:
    """Sums over ranks of loss and gradients against those of whole sequences on one."""
    context = ContextGroup(dist.group.WORLD)
    split = of_masks(model, context, batch)
    loss, expected = gradients(model, batch)
    expected = {name: grad.clone() for name, grad in expected.items()}
    share, found = gradients(model, batch, context=split)
    dist.all_reduce(share)
    assert abs(share - loss) <= 1e-5 * loss
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in found.items():
        dist.all_reduce(grad)
        if name.endswith("k_ln.bias"):  # adds the same to all scores of a row: its gradient is 0, and rounding
            assert max(grad.abs().max(), expected[name].abs().max()) <= 1e-6 * largest, name
        else:
            assert (grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    return split


def ranks_alibi(folder: Path) -> None:
    for length in (37, 600):
        assert_equal_to_one_rank(build(), batch_of(length))


def ranks_steep(folder: Path) -> None:
    """Heads so steep that most keys stay away."""
    model = build(n_heads=8, attn_config={"alibi_bias_max": 2.0})
    split = assert_equal_to_one_rank(model, batch_of(641, rows=1))
    q, k = (split.take(x) for x in queries_and_keys(641, 8))
    needs = split.needs(q, k, alibi_slopes=slopes_of(model.config))
    assert exchanged(needs) < 0.4
    assert (exchanged(needs) > 0) == (split.mine[0][0] > 0)  # the first keys' owner has nothing before them


def ranks_fetch_what_heads_see(folder: Path) -> None:
    """Long sequences: each head's own range, and no less than what weighs more than 2^-24."""
    length, slopes = 2048, kernels.alibi_slopes(8)
    whole_q, whole_k = queries_and_keys(length, 8)
    split = ContextGroup(dist.group.WORLD).split(length, alibi_slopes=slopes)
    needs = split.needs(split.take(whole_q), split.take(whole_k), alibi_slopes=slopes)
    assert exchanged(needs) < 0.75
    away = torch.arange(length)[:, None] - torch.arange(length)
    for head in range(8):
        scores = whole_q[0, :, head].double() @ whole_k[0, :, head].double().T / 8 - float(slopes[head]) * away
        p = scores.masked_fill(away < 0, -torch.inf).softmax(-1)
        for (first, last), start in zip(split.mine, needs.starts[split.context.rank, :, head].tolist()):
            assert p[first:last, :start].sum(-1).max() <= 2.0**-24
    starts = needs.starts[split.context.rank]
    assert (starts[:, 0] >= starts[:, 7]).all() and (starts[-1, 0] > starts[-1, 7])


def ranks_dropout(folder: Path) -> None:
    """Zero values for dropped probabilities: the mean over draws is the output without dropout."""
    torch.manual_seed(dist.get_rank())
    length, slopes = 64, kernels.alibi_slopes(8)
    split = ContextGroup(dist.group.WORLD).split(length, alibi_slopes=slopes)
    q, k = (split.take(x) for x in queries_and_keys(length, 8))
    expected = split.attention(q, k, k, alibi_slopes=slopes)
    draws = [split.attention(q, k, k, alibi_slopes=slopes, dropout_p=0.2) for _ in range(60)]
    assert not torch.equal(draws[0], draws[1])
    error = (torch.stack(draws).mean(0) - expected).abs().mean() / expected.abs().mean()
    assert error < 0.15


def ranks_other_dtypes(folder: Path) -> None:
    """float64 to its own precision; bf16 travels as bf16."""
    length, slopes = 200, kernels.alibi_slopes(8)
    split = ContextGroup(dist.group.WORLD).split(length, alibi_slopes=slopes)
    for dtype, error in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        q, k = (x.to(dtype) for x in queries_and_keys(length, 8))
        expected: Any = kernels.flash_attention(q, k, k, alibi_slopes=slopes)
        found = split.attention(split.take(q), split.take(k), split.take(k), alibi_slopes=slopes)
        assert found.dtype == dtype
        assert (found - split.take(expected)).abs().max() <= error


def ranks_refuse(folder: Path) -> None:
    model, batch = build(), batch_of(40)
    split = of_masks(model, ContextGroup(dist.group.WORLD), batch)
    with pytest.raises(ValueError, match="41 tokens and context was made for 40"):
        model(**batch_of(41), context=split)
    ids = {"sequence_id": documents(40, [[20, 20], [40]])}
    packed = of_masks(model, split.context, batch | ids)
    with (
        pytest.warns(UserWarning, match="no effect"),
        pytest.raises(ValueError, match="context was made from sequence"),
    ):
        model(**batch, **ids, context=packed)
    with pytest.raises(ValueError, match="output_attentions does not work where ranks share"):
        model(**batch, context=split, output_attentions=True)
    with pytest.raises(ValueError, match="prefix_mask does not work"):
        build(attn_config={"prefix_lm": True})(**batch, context=split, prefix_mask=torch.zeros(2, 40, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"labels are \(2, 39\); they must be \(B, S\) = \(2, 40\)"):
        model(batch["input_ids"], labels=batch["labels"][:, 1:], context=split)


def ranks_documents(folder: Path) -> None:
    model = build(attn_config={"attn_uses_sequence_id": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2})
    batch = batch_of(301) | {"sequence_id": documents(301, [[120, 5, 130], [1, 40, 200, 60]])}
    batch["labels"][batch["sequence_id"] < 0] = -100
    assert_equal_to_one_rank(model, batch)


def ranks_padding(folder: Path) -> None:
    """Left and right padding, learned positions, biases, norms of q and k, multi-query attention."""
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :31], mask[1, 60:] = False, False
    batch = batch_of(90) | {"attention_mask": mask}
    batch["labels"] = batch["labels"].masked_fill(~mask, -100)
    plain = build(attn_config={"alibi": False, "qk_ln": True}, no_bias=False, max_seq_len=90)
    for model in (plain, build(attn_config={"attn_type": "multiquery_attention", "clip_qkv": 0.5})):
        assert_equal_to_one_rank(model, batch)


def ranks_checkpointing(folder: Path) -> None:
    for mode in ("full", "selective"):
        model = build()
        model.transformer.set_activation_checkpointing(mode)
        assert_equal_to_one_rank(model, batch_of(300))


def measured_work(length: int, slopes: Tensor, size: float) -> Tensor:
    """(length,): keys that the attention reads for each query, over heads, for random directions and scale*|q||k| =
    size.
    """
    q, k = (x / x.norm(dim=-1, keepdim=True) * size**0.5 for x in queries_and_keys(length, len(slopes), 16))
    rules = Rules(True, None, 0, None, None, None)
    q, k = q.permute(2, 0, 1, 3), k[0].transpose(0, 1)
    starts = first_kept(q, k, slopes[:, None], rules, chunk=128, bits=24)[:, 0].repeat_interleave(128, 1)[:, :length]
    return (torch.arange(1, length + 1) - starts).sum(0)


def balance(blocks: list[list[Block]], work: Tensor) -> float:
    """The most work of a rank over the mean, for blocks by rank and the work (S,) at each position."""
    loads = [sum(float(work[first:last].sum()) for first, last in part) for part in blocks]
    return max(loads) * len(loads) / sum(loads)


@pytest.mark.parametrize(
    ("length", "heads", "bias_max"),
    [(4096, 8, 8.0), (3001, 12, 16.0), pytest.param(8192, 8, 8.0, marks=pytest.mark.slow)],
)
def test_no_rank_has_much_more_than_the_mean(length: int, heads: int, bias_max: float) -> None:
    slopes = kernels.alibi_slopes(heads, bias_max)
    for norm in (1.0, 25.0):
        work = measured_work(length, slopes, norm)
        for size in (2, 4, 8):
            blocks, expected = deal(length, size, slopes)
            assert max(expected, balance(blocks, work)) <= 1.2


@pytest.mark.parametrize("size", [2, 4, 8])
def test_packed_documents_are_balanced(size: int) -> None:
    slopes, generator = kernels.alibi_slopes(8), torch.Generator().manual_seed(size)
    for mean in (2, 5, 30):
        borders = torch.randint(1, 8192, (2, mean), generator=generator)
        ids = torch.zeros(2, 8192, dtype=torch.int64).scatter_(1, borders, 1).cumsum(1)
        begin = torch.stack([torch.searchsorted(row, row) for row in ids])
        blocks, expected = deal(8192, size, slopes, begin)
        assert expected <= 1.25
        for window in (17.0, 40.0):
            seen = torch.arange(1, 8193) - begin
            work = sum(seen.clamp(max=int(window / slope)).sum(0) for slope in slopes.tolist())
            assert balance(blocks, work) <= 1.25


@pytest.mark.parametrize(("length", "size"), [(1, 1), (5, 2), (7, 7), (601, 4), (4096, 8)])
@pytest.mark.parametrize("slopes", [None, kernels.alibi_slopes(4)])
def test_every_token_is_someones(length: int, size: int, slopes: Tensor | None) -> None:
    blocks, _ = deal(length, size, slopes)
    tokens = [torch.cat([torch.arange(*block) for block in part]) for part in blocks]
    assert torch.equal(torch.cat(tokens).sort().values, torch.arange(length))
    counts = [len(part) for part in tokens]
    assert max(counts) - min(counts) <= len(blocks[0])
    assert len({len(part) for part in blocks}) == 1


def test_more_ranks_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 3 tokens cannot be shared by 4 ranks"):
        deal(3, 4)


CHECKS = {name: check for name, check in globals().items() if name.startswith("ranks_")}


def rank_main(rank: int, world_size: int, port: int, folder: Path, names: list[str]) -> None:
    """One process of a launch: the checks in turn, up to the first that fails; the outcome goes to a file."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    outcome = {}
    for name in names:
        try:
            CHECKS[name](folder)
            outcome[name] = ""
        except BaseException:
            outcome[name] = f"rank {rank}: {traceback.format_exc()}"
            break
    (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    os._exit(0)  # After a failure the other ranks may wait in a collective: they see this one leave.


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of all checks on 2 (or 4) ranks, rank by rank."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, args=(request.param, port, folder, list(CHECKS)), nprocs=request.param)
    return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", CHECKS)
def test_ranks(outcomes: list[dict[str, str]], name: str) -> None:
    for outcome in outcomes:
        assert outcome.get(name, "not run: an earlier check failed") == ""
