"""Block inputs in host memory: the same gradients, the right tensors, and memory that is given back."""

import gc
import weakref

import pytest
import torch

from mpt import MptConfig, MptForCausalLM
from mpt.offload import HostOffload


def make(**changes):
    torch.manual_seed(0)
    model = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=64, max_seq_len=16, **changes))
    return model.train()


def gradients(model, ids):
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    model(ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradients_are_the_same_to_the_bit(mode, monkeypatch):
    model, ids = make(resid_pdrop=0.1), torch.randint(64, (2, 16))
    model.transformer.set_activation_checkpointing(mode)
    expected = gradients(model, ids)
    kept, fetched = [], []
    keep, unpack = HostOffload._keep, HostOffload._unpack
    monkeypatch.setattr(HostOffload, "_keep", lambda self, x: (kept.append(x.clone()), keep(self, x))[1])
    monkeypatch.setattr(HostOffload, "_unpack", lambda self, x: (fetched.append(x), unpack(self, x))[1])
    inputs = []
    for block in model.transformer.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    model.transformer.set_activation_checkpointing(mode, offload=True)
    got = gradients(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert len(kept) == 3 and all(torch.equal(a, b) for a, b in zip(kept, inputs))
    assert [x for x in fetched if isinstance(x, int)] == [2, 1, 0]


def test_the_devices_copies_are_given_back():
    """Between forward and backward nothing but the host's copies holds the inputs of blocks."""
    model, ids = make(), torch.randint(64, (2, 16))
    alive = []

    def remember(_, args):
        alive.append(weakref.ref(args[0].untyped_storage()))

    for offload in (False, True):
        alive.clear()
        model.transformer.set_activation_checkpointing("full", offload=offload)
        handles = [block.register_forward_pre_hook(remember) for block in model.transformer.blocks]
        loss = model(ids, labels=ids).loss
        gc.collect()
        assert [ref() is not None for ref in alive] == [not offload] * 3
        loss.backward()
        for handle in handles:
            handle.remove()


def test_a_second_backward_fetches_again():
    x = torch.randn(4, requires_grad=True)
    offload = HostOffload()
    with offload.input(x):
        y = (x * x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, 2 * x) and torch.equal(torch.autograd.grad(y, x)[0], first)


def test_nothing_is_kept_without_a_backward_to_come(monkeypatch):
    model, ids = make(), torch.randint(64, (2, 16))
    model.transformer.set_activation_checkpointing("full", offload=True)
    monkeypatch.setattr(HostOffload, "_keep", None)
    with torch.no_grad():
        model(ids, labels=ids)
    model.eval()(ids, labels=ids)


def test_offload_needs_checkpointing():
    with pytest.raises(ValueError, match='mode must not be "none"'):
        make().transformer.set_activation_checkpointing("none", offload=True)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_mlps_in_chunks_give_the_same_gradients(mode):
    model, ids = make(), torch.randint(64, (2, 16))
    expected = gradients(model, ids)
    model.transformer.set_activation_checkpointing(mode)
    model.transformer.set_mlp_chunk_size(5)
    for a, b in zip(gradients(model, ids), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model, ids = make().cuda(), torch.randint(64, (2, 16), device="cuda")
    model.transformer.set_activation_checkpointing("full")
    expected = gradients(model, ids)
    model.transformer.set_activation_checkpointing("full", offload=True)
    for _ in range(3):
        for a, b in zip(gradients(model, ids), expected):
            torch.testing.assert_close(a, b)
