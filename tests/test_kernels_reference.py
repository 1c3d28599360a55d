"""The specification itself: attention against loops over single pairs, the rest against torch's own functions."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import reference

MASKS = ("attention_mask", "sequence_id", "prefix_mask")


def sees(b, i, j, *, causal, attention_mask, sequence_id, prefix_mask, window):
    """The visibility rules, pair by pair; i and j are positions."""
    if causal and j > i and not (prefix_mask is not None and prefix_mask[b, j]):
        return False
    if window is not None and abs(i - j) >= window:
        return False
    if attention_mask is not None and not attention_mask[b, j]:
        return False
    return sequence_id is None or bool(sequence_id[b, i] == sequence_id[b, j] >= 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("masks", [(), ("attention_mask",), ("sequence_id",), MASKS])
@pytest.mark.parametrize(("s", "t", "offset"), [(6, 6, 0), (2, 6, 4), (3, 7, 1)])
def test_attention_is_what_the_loops_say(causal, window, masks, s, t, offset):
    b, h, g, d = 2, 4, 2, 3
    made = (torch.rand(b, t) > 0.4, torch.randint(-1, 2, (b, t)), torch.rand(b, t) > 0.6)
    rules = {name: m if name in masks else None for name, m in zip(MASKS, made)} | {"causal": causal, "window": window}
    q, k, v = (torch.randn(shape).double() for shape in ((b, s, h, d), (b, t, g, d), (b, t, g, d)))
    slopes = kernels.alibi_slopes(h)
    out, lse = reference.flash_attention(q, k, v, alibi_slopes=slopes, query_offset=offset, return_lse=True, **rules)
    for bi, hi, si in itertools.product(range(b), range(h), range(s)):
        i, kv = si + offset, hi // (h // g)
        seen = [j for j in range(t) if sees(bi, i, j, **rules)]
        weights = [math.exp(q[bi, si, hi] @ k[bi, j, kv] / math.sqrt(d) - slopes[hi] * abs(i - j)) for j in seen]
        expected = sum((w / sum(weights) * v[bi, j, kv] for w, j in zip(weights, seen)), torch.zeros(d).double())
        torch.testing.assert_close(out[bi, si, hi], expected)
        assert float(lse[bi, hi, si]) == pytest.approx(math.log(sum(weights)) if seen else -math.inf)


def test_attention_equals_torchs():
    q, k, v = (torch.randn(2, 9, 4, 8) for _ in range(3))
    ours = reference.flash_attention(q, k, v, softmax_scale=0.2)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.2)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_dropout_drops_and_rescales():
    q, k = torch.zeros(1, 32, 8, 32), torch.zeros(1, 32, 8, 32)
    v = torch.eye(32).expand(8, 32, 32).transpose(0, 1)[None]
    p = reference.flash_attention(q, k, v, causal=False, dropout_p=0.25, seed=3)
    assert torch.equal(p, reference.flash_attention(q, k, v, causal=False, dropout_p=0.25, seed=3))
    assert p.unique().tolist() == pytest.approx([0.0, 1 / 32 / 0.75])
    assert (p == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_norms_equal_torchs():
    x, r, w, b = torch.randn(5, 16), torch.randn(5, 16), torch.randn(16), torch.randn(16)
    torch.testing.assert_close(reference.layer_norm(x, w, b, 1e-3), F.layer_norm(x, (16,), w, b, 1e-3))
    torch.testing.assert_close(reference.rms_norm(x, w, 1e-3), F.rms_norm(x, (16,), w, 1e-3))
    y, total = reference.layer_norm(x, w, residual=r)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(y, F.layer_norm(x + r, (16,), w))
    torch.testing.assert_close(reference.rms_norm(x, w, residual=r)[0], F.rms_norm(x + r, (16,), w, 1e-5))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_torchs(reduction, smoothing):
    h, w, labels = torch.randn(2, 7, 8), torch.randn(11, 8), torch.randint(11, (2, 7))
    labels[0, :3] = -100
    ours = reference.linear_cross_entropy(h, w, labels, logit_scale=0.7, label_smoothing=smoothing, reduction=reduction)
    logits = 0.7 * h @ w.T
    theirs = F.cross_entropy(logits.view(-1, 11), labels.view(-1), label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(ours, theirs.view(2, 7) if reduction == "none" else theirs)


def test_z_loss_is_the_square_of_the_log_sum():
    h, w, labels = torch.randn(7, 8), torch.randn(11, 8), torch.randint(11, (7,))
    labels[2] = -100
    total, without = (reference.linear_cross_entropy(h, w, labels, z_loss=z, reduction="sum") for z in (0.1, 0.0))
    torch.testing.assert_close(total - without, 0.1 * (h @ w.T).logsumexp(-1).square()[labels != -100].sum())


def test_lion_by_hand():
    p, g, m = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0]), torch.tensor([-0.05, -5.0])
    reference.lion_step([p], [g], [m], lr=0.1, betas=(0.9, 0.99), decay=0.5)
    torch.testing.assert_close(p, torch.tensor([0.5 - 0.1, 0.5 + 0.1]))
    torch.testing.assert_close(m, torch.tensor([0.99 * -0.05 + 0.01, 0.99 * -5 - 0.01]))


@pytest.mark.parametrize("name", sorted(set(kernels.__all__) - {"reference"}))
def test_same_arguments_as_the_public_function(name):
    public = inspect.signature(getattr(kernels, name)).parameters
    same = {k: (p.kind, p.default) for k, p in public.items() if k != "backend"}
    assert same == {k: (p.kind, p.default) for k, p in inspect.signature(getattr(reference, name)).parameters.items()}
