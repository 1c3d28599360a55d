"""A model sharded over two processes is the model of one: how it starts, its gradients, what it saves and loads."""

import dataclasses
import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from mpt import MptConfig, MptForCausalLM
from mpt.checkpoint import Source, load_weights, open_checkpoint, save_hf
from mpt.convert import convert
from mpt.initialize import init_weights, plain_name
from mpt.tensor_files import Stored
from trainer.parallel import leave

# An odd number of rows, and wte in more than one block of them; wte is tied, so the root group's weight makes logits.
SHAPE = {"d_model": 96, "n_heads": 4, "n_layers": 2, "vocab_size": 12_001, "max_seq_len": 40, "no_bias": False}
ATTN = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "alibi": False, "qk_ln": True}
CONFIG: dict[str, Any] = SHAPE | {"attn_config": ATTN, "init_config": {}}
IDS = torch.arange(12).view(2, 6)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def sharded() -> MptForCausalLM:
    with torch.device("meta"):
        model = MptForCausalLM(MptConfig(**CONFIG))
    for block in model.transformer.blocks:
        fully_shard(block)
    fully_shard(model)
    return model.to_empty(device="cpu")


def counted(source: Source) -> tuple[Source, dict[str, int]]:
    """A checkpoint that counts the rows that are read of each tensor."""
    rows: dict[str, int] = {}

    def count(name: str, stored: Stored) -> Stored:
        def read(start: int, stop: int) -> torch.Tensor:
            rows[name] = rows.get(name, 0) + stop - start
            return stored.rows(start, stop)

        return dataclasses.replace(stored, rows=read, place=None)

    tensors = {name: count(name, stored) for name, stored in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors), rows


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = sharded()
    init_weights(model, 11)
    model.transformer.set_activation_checkpointing("full")
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    digests = {name: digest(p.full_tensor()) for name, p in parameters.items()}
    gradients = {name: p.grad.full_tensor() for name, p in parameters.items()}
    save_hf(model.named_parameters(), model.config, f"{folder}/out", max_shard_size="1MB", write=rank == 0)
    loaded = {}
    for form in ("in", "in.pt"):
        again = sharded()
        source, rows = counted(open_checkpoint(f"{folder}/{form}"))
        load_weights(again, source)
        assert rows == {plain_name(name): len(p.to_local()) for name, p in again.named_parameters()}
        again = sharded()
        load_weights(again, f"{folder}/{form}")
        loaded[form] = {plain_name(name): digest(p.full_tensor()) for name, p in again.named_parameters()}
    if rank == 0:
        torch.save({"loss": loss, "digests": digests, "gradients": gradients, "loaded": loaded}, f"{folder}/results.pt")
    dist.barrier()
    leave(0)


@pytest.mark.filterwarnings("ignore:transformers .* does not honour")
def test_two_ranks_are_one(tmp_path: Path) -> None:
    model = MptForCausalLM(MptConfig(**CONFIG))
    init_weights(model, 3)
    model.save_pretrained(tmp_path / "in", max_shard_size="1MB")
    convert(open_checkpoint(tmp_path / "in"), tmp_path / "in.pt")
    read = {name: digest(p) for name, p in model.named_parameters()}
    init_weights(model, 11)
    start = {name: digest(p) for name, p in model.named_parameters()}
    loss = model(IDS, labels=IDS).loss
    loss.backward()

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results["digests"] == start
    assert results["loaded"] == {"in": read, "in.pt": read}
    assert abs(results["loss"] - loss) < 1e-5
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, p in model.named_parameters():
        ours, theirs = results["gradients"][name], p.grad
        if name.endswith("k_ln.bias"):  # adds the same to all scores of a row: its gradient is 0, and rounding
            assert max(ours.abs().max(), theirs.abs().max()) <= 1e-6 * largest, name
        else:
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name
    saved = MptForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: digest(p) for name, p in saved.named_parameters()} == start
