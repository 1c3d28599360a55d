"""Processes and devices: errors before anything is joined, sums and refusals that every rank shares."""

import ctypes

import pytest
import torch

from mpt import MptConfig, MptForCausalLM
from trainer import InputError
from trainer.parallel import (
    FsdpConfig,
    choose_device,
    give_back_freed_memory,
    join_world,
    materialize,
    shard_model,
)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(InputError, match=r"device=cuda.*device=cpu"):
        choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"process 2 of this node.*--nproc-per-node=2"):
        choose_device("cuda", 2)


def test_one_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):  # and can be joined again afterwards
        with join_world("cpu", FsdpConfig(), 60.0) as world:
            assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
            assert world.sum(1.5, 2) == [1.5, 2.0]
            world.agree(None)
            with pytest.raises(InputError, match="the disk is gone"):
                world.agree(InputError("the disk is gone"))
        assert not torch.distributed.is_initialized()


def test_a_replication_that_does_not_divide_the_world_is_refused() -> None:
    with pytest.raises(InputError, match="replicate=2 does not divide the 1 processes"):
        with join_world("cpu", FsdpConfig(replicate=2), 60.0):
            pass


@pytest.mark.parametrize("bf16", [False, True])
def test_a_sharded_model_computes_in_the_asked_dtype_with_fp32_parameters(bf16: bool) -> None:
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=16, init_device="meta")
    with join_world("cpu", FsdpConfig(), 60.0) as world:
        model = MptForCausalLM(config)
        assert all(p.is_meta for p in model.parameters())
        shard_model(model, world.mesh, FsdpConfig(), bf16=bf16)
        materialize(model, world.device, cpu_offload=False)
        for p in model.parameters():
            torch.nn.init.constant_(p, 0.01)
        out = model(torch.arange(16)[None] % 64, labels=torch.arange(16)[None] % 64, return_logits=True)
        out.loss.backward()
        assert out.logits.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


class MallInfo2(ctypes.Structure):
    """What glibc's mallinfo2 returns; hblks: pieces that have pages of their own."""

    _fields_ = [("before", ctypes.c_size_t * 3), ("hblks", ctypes.c_size_t), ("after", ctypes.c_size_t * 6)]


def test_freed_tensors_go_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("needs glibc 2.33")
    mallinfo2.restype = MallInfo2

    def pieces() -> int:
        return int(mallinfo2().hblks)

    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    give_back_freed_memory()
    torch.empty(30 << 20, dtype=torch.uint8)  # freed at once, it would teach glibc to keep smaller ones
    before = pieces()
    small, large = (torch.empty(mib << 20, dtype=torch.uint8) for mib in (3, 5))
    assert pieces() == before + 1 and len(small) < len(large)
