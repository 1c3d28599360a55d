"""Queries and keys on which exact skipping has to hold: made to break its bound, or of a model trained here; and what
it promises on them.
"""

import functools
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
import mpt
from kernels import reference

LARGEST = 2.0**-24  # of a row's total, what is skipped
ADDED = 2.0**-22  # to the error of the dense kernel: of the largest value, of the largest gradient
STEPS = 60  # of training

ADVERSARIES = (
    "norm 25",
    "huge norms",
    "one far key dominates",
    "far keys a little larger",
    "equal keys",
    "zeros",
    "tiny",
    "extremes",
    "own key is the worst",
    "values of extremes",
    "at the limit",
)
SKIPPED = ("norm 25", "equal keys", "zeros", "tiny", "values of extremes")  # where something must be left out


def adversary(kind: str, s: int, d: int, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, S, H, D) for the scale 1/sqrt(D), a head for each slope."""
    q, k, v = (torch.randn(1, s, len(slopes), d) for _ in range(3))
    if kind == "norm 25":  # scale * |q||k|
        q, k = (x * 5 / d**0.25 for x in (q, k))
    elif kind == "huge norms":
        q, k = q * 30, k * 30
    elif kind == "one far key dominates":
        k[:, 2] = q[:, -1] * 20
    elif kind == "far keys a little larger":
        k[:, : s // 3] *= 3
    elif kind == "equal keys":
        k[:] = k[:, :1].clone()
    elif kind == "zeros":
        q, k = q * 0, k * 0
    elif kind == "tiny":  # squares of these are zero in fp32
        q, k = q * 1e-22, k * 1e-20
    elif kind == "extremes":  # squares of these q overflow, which keeps everything; scores as usual
        q, k = q * 1e19, k * 1e-19
        q[:, ::2] *= 1e-19
    elif kind == "own key is the worst":
        k = -q.clone()
        k[:, : s // 3] *= -1.5
    elif kind == "values of extremes":
        v[:, 0] *= 1e8
    elif kind == "at the limit":  # later rows point at key 15, as long as the bound allows
        k *= 0.2
        k[..., 0] = 0
        k[:, 15] = 0
        k[:, 15, :, 0] = d**0.5
        away = slopes * (torch.arange(s)[:, None] - 15) - 24.07 * math.log(2) - (1 / slopes + 0.6).log()
        q[:] = 0
        q[..., 0] = away.clamp_min(0)
    return q, k, v


@functools.cache
def trained() -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """q, k, v (1, 1024, 8, 16) of each block of a small MPT, and its slopes: trained here on Python's own library, byte
    by byte, then run on a part of it that it has not seen. The same at each call.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join((folder / name).read_bytes() for name in ("argparse.py", "ast.py", "inspect.py", "typing.py"))
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(0)
        config = mpt.MptConfig(d_model=128, n_heads=8, n_layers=2, vocab_size=256, max_seq_len=256)
        model = mpt.MptForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
        losses = []
        for _ in range(STEPS):
            first = torch.randint(len(stream) - 1024 - 256, (4,))
            ids = torch.stack([stream[i : i + 256] for i in first])
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-10:]) < sum(losses[:10]), "it did not learn"
        found: list[list[Tensor]] = []
        for block in model.transformer.blocks:
            block.attn.Wqkv.register_forward_hook(
                lambda _, __, qkv: found.append([x.unflatten(-1, (8, 16)) for x in qkv.chunk(3, -1)])
            )
        with torch.no_grad():
            model.eval()(stream[-1024:][None])
    device = torch.get_default_device()
    return [(q.to(device), k.to(device), v.to(device)) for q, k, v in found], kernels.alibi_slopes(8)


def starts(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, *, triton: bool, **rules: Any) -> Tensor:
    """The first key that each query is given, (B, H, S), for as many heads of k as of q."""
    masks = (rules.get(name) for name in ("attention_mask", "sequence_id", "prefix_mask"))
    settings = (True, q.shape[-1] ** -0.5, rules.get("window"), 0, 0.0, True, "ieee" if triton else None)
    found = torch.ops.mpt.flash_attention(q, k, v, slopes, *masks, None, *settings)[2]
    if not triton:  # (heads * batch, 1, chunks)
        found = found.view(q.shape[2], q.shape[0], -1).transpose(0, 1)
    tile = -(-q.shape[1] // found.shape[-1])
    return found.repeat_interleave(1 << (tile - 1).bit_length(), -1)[..., : q.shape[1]]


def weights(q: Tensor, k: Tensor, slopes: Tensor, **rules: Any) -> Tensor:
    """The probabilities (B, H, S, T) in float64."""
    eye = torch.eye(k.shape[1]).double()[None, :, None].expand(*k.shape[:3], -1)
    scale = q.shape[-1] ** -0.5
    p = reference.flash_attention(q.double(), k.double(), eye, alibi_slopes=slopes, softmax_scale=scale, **rules)
    assert isinstance(p, Tensor)
    return p.transpose(1, 2)


def hold(
    attend: Callable[..., Any], inputs: tuple[Tensor, Tensor, Tensor], slopes: Tensor, *, triton: bool, skips: bool
) -> None:
    """Hold `attend` to the promise on q, k, v in fp32: what a row is not given weighs at most 2^-24 of it, and the
    errors of out and gradients are those of the same kernel without skipping, or what the error rule grants any, and
    2^-22 of the largest value or gradient. skips: something has to be left out.
    """
    q, k, v = inputs
    first = starts(q, k, v, slopes, triton=triton)
    dropped = torch.arange(q.shape[1]) < first[..., None]
    assert (weights(q, k, slopes) * dropped).sum(-1).max() <= LARGEST
    assert dropped.any() or not skips, "nothing was skipped"
    do = torch.randn_like(v)

    def run(function: Callable[..., Any], dtype: torch.dtype, **kwargs: Any) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, alibi_slopes=slopes, **kwargs)
        return [out.detach(), *torch.autograd.grad(out, leaves, do.to(dtype))]

    exact = run(reference.flash_attention, torch.float64)
    plain = run(reference.flash_attention, torch.float32)
    skipping, dense = (run(attend, torch.float32, skip=skip) for skip in (True, False))
    for name, got, usual, torch_, true in zip(("out", "dq", "dk", "dv"), skipping, dense, plain, exact):
        largest = (v if name == "out" else true).abs().max()
        if name == "dq" and (k == k[:, :1]).all():
            largest = do.abs().max() * v.abs().max() * k.abs().max()  # dq itself is zero but for rounding
        error, allowed, simple = ((x.double() - true).abs().max() for x in (got, usual, torch_))
        allowed = max(allowed, 2 * simple + 2 * torch.finfo(torch.float32).eps * true.abs().max())
        assert error <= allowed + ADDED * largest, f"{name}: {error:.3e}, without skipping {allowed:.3e}"
