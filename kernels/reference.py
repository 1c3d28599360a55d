"""Each operation in a few plain lines of torch: the specification that every implementation is tested against.

Same names and arguments as the public functions. Nothing is chunked, fused or skipped; autograd differentiates it as
often as wanted. Statistics, scores, softmax and losses are in fp32 (in float64 for float64 inputs).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.alibi import alibi_slopes as alibi_slopes
from kernels.backend import wide


def visible_pairs(
    queries: int,
    keys: int,
    *,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    window: int | None = None,
    query_offset: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Which query sees which key: bool (B or 1, 1, S, T). The rules are those of `flash_attention`."""
    i = torch.arange(query_offset, query_offset + queries, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    see = (j <= i if causal else torch.ones_like(j <= i))[None, None]
    if prefix_mask is not None:
        see = see | prefix_mask.bool()[:, None, None, :]
    if window is not None:
        see = see & ((i - j).abs() < window)
    if attention_mask is not None:
        see = see & attention_mask.bool()[:, None, None, :]
    if sequence_id is not None:
        own = sequence_id[:, query_offset : query_offset + queries]
        same = (own[:, :, None] == sequence_id[:, None, :]) & (sequence_id >= 0)[:, None, :]
        see = see & same[:, None]
    return see


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    attention_mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    window: int | None = None,
    query_offset: int = 0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    skip: bool = True,
    return_lse: bool = False,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale*q.k - m*|i-j|) v over the visible keys; a query that sees none gives 0 and LSE -inf. `skip` changes
    nothing here.
    """
    (_, s, h, d), (t, g) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(h // g, 2) for x in (k, v))
    up = wide(q.dtype)
    scores = torch.einsum("bshd,bthd->bhst", q.to(up), k.to(up)) * (d**-0.5 if softmax_scale is None else softmax_scale)
    if alibi_slopes is not None:
        i = torch.arange(query_offset, query_offset + s, device=q.device)[:, None]
        distance = (i - torch.arange(t, device=q.device)).abs().to(up)
        scores = scores - alibi_slopes.to(q.device, up)[:, None, None] * distance
    see = visible_pairs(
        s,
        t,
        causal=causal,
        attention_mask=attention_mask,
        sequence_id=sequence_id,
        prefix_mask=prefix_mask,
        window=window,
        query_offset=query_offset,
        device=q.device,
    )
    blind = ~see.any(-1, keepdim=True)
    scores = scores.masked_fill(~see, float("-inf")).masked_fill(blind, 0.0)
    p = scores.softmax(-1).masked_fill(blind, 0.0)
    if dropout_p:
        generator = None if seed is None else torch.Generator(q.device).manual_seed(int(seed))
        keep = torch.rand(p.shape, generator=generator, device=q.device) >= dropout_p
        p = p * keep / (1.0 - dropout_p)
    out = torch.einsum("bhst,bthd->bshd", p.to(v.dtype), v)
    if not (return_lse or return_kept):
        return out
    lse = scores.logsumexp(-1).masked_fill(blind[..., 0], float("-inf"))
    return (out, *([lse] if return_lse else []), *([torch.ones((), device=q.device)] if return_kept else []))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    key_norms: Tensor | None = None,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale*q.k - m*(i-j)) v over the keys j <= i, query s of row b being at i = lengths[b] - S + s.
    `key_norms` changes nothing here.
    """
    (_, s, h, d), (g, t) = q.shape, k_cache.shape[1:3]
    up, scale = wide(q.dtype), d**-0.5 if softmax_scale is None else softmax_scale
    i = lengths[:, None] - s + torch.arange(s, device=q.device)
    away = (i[:, :, None] - torch.arange(t, device=q.device))[:, None]
    filled = (torch.arange(t, device=q.device) < lengths[:, None])[:, None, :, None]
    k, v = (x.where(filled, 0.0).repeat_interleave(h // g, 1) for x in (k_cache, v_cache))
    scores = torch.einsum("bshd,bhtd->bhst", q.to(up), k.to(up)) * scale
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.device, up)[:, None, None] * away
    p = scores.masked_fill(away < 0, float("-inf")).softmax(-1)
    out = torch.einsum("bhst,bhtd->bshd", p.to(v.dtype), v)
    return (out, torch.ones((), device=q.device)) if return_kept else out


def update_key_norms(key_norms: Tensor, k_new: Tensor, start: int | Tensor) -> None:
    """key_norms[b, g, c]: the largest |k| among the keys before position 64 * (c + 1), in place; `k_new` begins at
    `start`.
    """
    for b, first in enumerate(start.tolist() if isinstance(start, Tensor) else [start] * len(k_new)):
        for s, norm in enumerate(k_new[b].norm(dim=-1, dtype=torch.float32).unbind(-1)):
            block, begins = divmod(first + s, 64)
            if not begins:
                key_norms[b, :, block] = key_norms[b, :, block - 1] if block else 0.0
            key_norms[b, :, block] = key_norms[b, :, block].maximum(norm)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean)/sqrt(var + eps)*weight + bias over the last dimension; with `residual`, of x + residual, which is
    returned too.
    """
    total = x if residual is None else x + residual
    up = wide(total.dtype)
    bias = None if bias is None else bias.to(up)
    y = F.layer_norm(total.to(up), total.shape[-1:], weight.to(up), bias, eps).to(x.dtype)
    return y if residual is None else (y, total)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x*rsqrt(mean(x^2) + eps)*weight over the last dimension; `residual` as in `layer_norm`."""
    total = x if residual is None else x + residual
    y = total.to(wide(total.dtype))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(y.dtype)).to(x.dtype)
    return y if residual is None else (y, total)


def mlp(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """down(gelu(up(x))), GELU exact. `chunk_size` changes nothing here."""
    return F.linear(F.gelu(F.linear(x, up_weight, up_bias)), down_weight, down_bias)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of softmax(logit_scale * hidden weight^T) plus z_loss * lse^2, over the labels that count.
    `chunk_size` changes nothing here.
    """
    logits = F.linear(hidden, weight).to(wide(hidden.dtype)) * logit_scale
    logits, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    loss = F.cross_entropy(logits, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    counts = flat != ignore_index
    loss = torch.where(counts, loss + z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss.view(labels.shape)
    return loss.sum() / counts.sum().clamp(min=1) if reduction == "mean" else loss.sum()


@torch.no_grad()
def lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    decay: float,
) -> None:
    """p *= 1 - decay; p -= lr*sign(b1*m + (1-b1)*g); m = b2*m + (1-b2)*g, in place."""
    for p, g, m in zip(params, grads, exp_avgs, strict=True):
        up = torch.promote_types(p.dtype, m.dtype)
        g_up, m_up = g.to(up), m.to(up)
        p.copy_(p.to(up) * (1 - decay) - lr * torch.sign(betas[0] * m_up + (1 - betas[0]) * g_up))
        m.copy_(betas[1] * m_up + (1 - betas[1]) * g_up)
