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
from mpt import MptConfig, MptForCausalLM
from mpt.context import ContextGroup, ContextSplit, balance, deal
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


def documents(length: int, lengths: list[list[int]]) -> Tensor:
    """Sequence ids for documents of the given lengths by row, the rest padding (-1)."""
    ids = torch.full((len(lengths), length), -1)
    for row, sizes in zip(ids, lengths):
        filled = [i for i, size in enumerate(sizes) for _ in range(size)]
        row[: len(filled)] = torch.tensor(filled)
    return ids


def of_masks(model: MptForCausalLM, context: ContextGroup, batch: dict[str, Tensor]) -> ContextSplit:
    attn = model.config.attn_config
    slopes = kernels.alibi_slopes(model.config.n_heads, attn.alibi_bias_max) if attn.alibi else None
    masks = {name: batch.get(name) for name in ("attention_mask", "sequence_id")}
    return context.split(batch["input_ids"].shape[1], alibi_slopes=slopes, **masks)


def gradients(model: MptForCausalLM, batch: dict[str, Tensor], **extra: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, return_logits=False, **extra).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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
    model = build(n_heads=8, attn_config={"alibi_bias_max": 4.0})
    batch = batch_of(641, rows=1)
    split = assert_equal_to_one_rank(model, batch)


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


@pytest.fixture(scope="module", params=[2, 4])
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
