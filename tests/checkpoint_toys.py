"""A small model with what is awkward to save, optimizers, and ways to save, compare and damage checkpoints."""

import contextlib
import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.checkpoint import Checkpointer

FINGERPRINT = {"model": {"d_model": 8, "betas": (0.9, 0.95)}, "seed": 17}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 13, bias=False)
        self.down = nn.Linear(13, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Toy(nn.Module):
    """Odd sizes, fewer rows than ranks, a persistent buffer, and a head tied to the embedding."""

    def __init__(self, vocab=11):
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: {"d_model": 8, "vocab_size": vocab})
        self.wte = nn.Embedding(vocab, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.gate = nn.Linear(8, 1)
        self.lm_head = nn.Linear(8, vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("seen", torch.arange(3))

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x * self.gate(x))


class Lion(torch.optim.Optimizer):
    """Only the shape of its state matters here: a momentum, no step."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(torch.sign(momentum + p.grad), alpha=group["lr"])
                momentum.lerp_(p.grad, 0.1)


def make(seed=0, *, lion=False, mesh=None, vocab=11):
    """A toy model, sharded where torch.distributed is initialised, and its optimizer, both fresh."""
    torch.manual_seed(seed)
    model = Toy(vocab)
    if dist.is_initialized():
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    optimizer = Lion(model.parameters()) if lion else torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return model, optimizer


def train(model, optimizer, steps, seed=1):
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def digests(model, optimizer):
    """Name -> SHA-256 of the whole tensor's bytes, for all parameters, buffers and optimizer state."""
    tensors = dict(model.state_dict(keep_vars=True))
    names = {id(tensor): name for name, tensor in tensors.items()}
    for parameter, slots in optimizer.state.items():
        tensors |= {f"{names[id(parameter)]}/{slot}": value for slot, value in slots.items()}
    whole = {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in tensors.items()}
    return {n: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for n, t in whole.items()}


class Messages(list):
    def __call__(self, text):
        self.append(text)

    def __contains__(self, part):
        return any(part in text for text in self)


@contextlib.contextmanager
def opened(folder, **options):
    options = {
        "keep": -1,
        "fingerprint": FINGERPRINT,
        "asynchronous": False,
        "on_error": "stop",
        "fsync": False,
    } | options
    checkpointer = Checkpointer(Path(folder), **options)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def save_steps(folder, model, optimizer, steps, **options):
    """Train and save up to each of `steps`; step -> digests."""
    saved, done = {}, 0
    with opened(folder, **options) as checkpointer:
        for step in steps:
            train(model, optimizer, step - done)
            done = step
            checkpointer.save(step, model, optimizer, {"step": step, "tokens": 10 * step})
            saved[step] = digests(model, optimizer)
    return saved


def flip_bit(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1 << 4
    path.write_bytes(data)
