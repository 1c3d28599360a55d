"""Linear + cross-entropy: the error rule with every option, ignored labels, chunks, what never exists whole, the
boundary with autograd.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tolerance import compare, compare_pooled

import kernels
from kernels import reference
from kernels.linear_cross_entropy import _Loss, _run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"logit_scale": 0.3},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"logit_scale": 1.7, "label_smoothing": 0.2, "z_loss": 0.1},
]


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, **kwargs) -> None:
    plain = {k: v for k, v in kwargs.items() if k != "chunk_size"}
    ours = partial(kernels.linear_cross_entropy, **kwargs)
    compare(ours, partial(reference.linear_cross_entropy, **plain), [h, w, labels], dtype)


def inputs(n: tuple[int, ...], d: int = 24, vocab: int = 130, ignored: float = 0.3):
    """The weight is uniform: then many of its elements, not one, decide the largest error of a gradient."""
    labels = torch.randint(vocab, n)
    labels[torch.rand(n) < ignored] = -100
    return torch.randn(*n, d), (torch.rand(vocab, d) - 0.5) * (12 / d) ** 0.5, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients(options: dict, reduction: str, dtype: torch.dtype):
    for chunk_size in (None, 20):
        both(*inputs((3, 43)), dtype, reduction=reduction, chunk_size=chunk_size, **options)


@pytest.mark.parametrize("n", [(1,), (17,), (127,), (129,), (2, 3, 5)])
@pytest.mark.parametrize("ignored", [0.0, 0.9])
def test_lengths(n: tuple[int, ...], ignored: float):
    draws = [inputs(n, ignored=ignored) for _ in range(max(8, round(64 / (math.prod(n) * (1 - ignored)))))]
    ours = partial(kernels.linear_cross_entropy, chunk_size=16)
    compare_pooled(ours, reference.linear_cross_entropy, draws, torch.float32)


def test_large_logits():
    h, w, labels = inputs((60,))
    for dtype in DTYPES:
        both(h * 20, w, labels, dtype, z_loss=0.001)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [5, 0])
def test_no_label_that_counts(reduction: str, n: int):
    h, w, _ = inputs((n,))
    h, w = h.requires_grad_(), w.requires_grad_()
    loss = kernels.linear_cross_entropy(
        h, w, torch.full((n,), -100), reduction=reduction, z_loss=0.1, label_smoothing=0.1
    )
    assert (loss == 0).all() and loss.shape == (() if reduction != "none" else (n,))
    dh, dw = torch.autograd.grad(loss.sum(), (h, w))
    assert (dh == 0).all() and (dw == 0).all()


def test_ignored_tokens_take_no_part_even_when_not_finite():
    h, w, labels = inputs((40,))
    bad = h.clone()
    bad[labels == -100] = torch.nan
    expected, got = (
        (loss, *torch.autograd.grad(loss, leaves))
        for leaves in ((h.requires_grad_(), w.requires_grad_()), (bad.requires_grad_(), w))
        for loss in [kernels.linear_cross_entropy(*leaves, labels)]
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_another_ignore_index():
    h, w, labels = inputs((130,), ignored=0)
    labels[:40] = 7
    both(h, w, labels, torch.float32, ignore_index=7)


def test_gradients_of_the_loss_may_be_scaled_twice():
    h, w, labels = (t.requires_grad_() if t.is_floating_point() else t for t in inputs((30,)))
    loss = kernels.linear_cross_entropy(h, w, labels)
    first = torch.autograd.grad(loss * 3, (h, w), retain_graph=True)
    second = torch.autograd.grad(loss * 6, (h, w))
    for a, b in zip(first, second):
        torch.testing.assert_close(a * 2, b)


def test_none_with_an_expanded_gradient():
    h, w, labels = (t.requires_grad_() if t.is_floating_point() else t for t in inputs((30,)))
    none, total = (kernels.linear_cross_entropy(h, w, labels, reduction=r) for r in ("none", "sum"))
    ours = torch.autograd.grad(none, (h, w), torch.ones(()).expand(30))
    for a, b in zip(ours, torch.autograd.grad(total, (h, w))):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    h, w, labels = inputs((5,), 3, 6)
    labels[0] = 1
    for options in OPTIONS:
        for reduction in ("mean", "sum", "none"):
            function = partial(
                kernels.linear_cross_entropy, labels=labels, reduction=reduction, chunk_size=2, **options
            )
            assert torch.autograd.gradcheck(function, (h.double().requires_grad_(), w.double().requires_grad_()))


def test_frozen_weight_or_hidden():
    h, w, labels = inputs((30,))
    for frozen in (0, 1):
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((h, w))]
        (ours,) = torch.autograd.grad(kernels.linear_cross_entropy(*leaves, labels), leaves[1 - frozen])
        (plain,) = torch.autograd.grad(reference.linear_cross_entropy(*leaves, labels), leaves[1 - frozen])
        torch.testing.assert_close(ours, plain)


def test_weight_gradient_is_summed_in_fp32():
    """Many chunks of one token each, bf16: a sum kept in bf16 would stop growing."""
    h, w, labels = inputs((2000,), 8, 20, 0)
    both(h, w, labels, torch.bfloat16, chunk_size=1, reduction="sum")


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            self.size = max(self.size, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_never_exist_whole(reduction: str):
    """512 tokens on 5000 words in chunks of 32: nothing is larger than a chunk's logits or the weight."""
    h, w, labels = inputs((512,), 16, 5000)
    h, w = h.requires_grad_(), w.requires_grad_()
    factor = None if reduction == "mean" else torch.ones(512)
    with Largest() as largest, torch.no_grad():
        _run(h, w, labels, _Loss(-100, 1.0, 0.1, 0.1), 32, (True, True), factor)
    assert largest.size <= 32 * 5000


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast(backend: str | None):
    h, w, labels = (t.requires_grad_() if t.is_floating_point() else t for t in inputs((40,)))
    with torch.autocast(h.device.type, torch.bfloat16):
        loss = kernels.linear_cross_entropy(h, w, labels, backend=backend)
    assert loss.dtype == torch.float32
    logits = F.linear(h.bfloat16(), w.bfloat16()).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    grads = torch.autograd.grad(loss, (h, w))
    assert [g.dtype for g in grads] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, dtype: torch.dtype):
    h, w, labels = inputs((9,))
    h, w = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    settings = (-100, 0.5, 0.1, 0.01, reduction, 4, True, True, False)
    torch.library.opcheck(torch.ops.mpt.linear_cross_entropy, (h, w, labels, *settings))
    with torch.no_grad():
        loss, *saved = torch.ops.mpt.linear_cross_entropy(h, w, labels, *settings)
        args = (torch.ones_like(loss), *saved, h.detach(), w.detach(), labels, *settings)
        torch.library.opcheck(torch.ops.mpt.linear_cross_entropy_backward, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_and_checkpoint(reduction: str):
    torch._dynamo.reset()
    h, w, labels = (t.requires_grad_() if t.is_floating_point() else t for t in inputs((20,)))

    def step(h, w):
        return kernels.linear_cross_entropy(h, w, labels, reduction=reduction).sum() * 2

    expected = torch.autograd.grad(step(h, w), (h, w))
    checkpointed = partial(torch.utils.checkpoint.checkpoint, step, use_reentrant=False)
    for other in (torch.compile(step, backend="aot_eager", fullgraph=True), checkpointed):
        for got, want in zip(torch.autograd.grad(other(h, w), (h, w)), expected):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused_by_name(reduction: str):
    h, w, labels = (t.requires_grad_() if t.is_floating_point() else t for t in inputs((20,)))
    loss = kernels.linear_cross_entropy(h, w, labels, reduction=reduction).sum()
    (dh,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mpt::linear_cross_entropy has no second derivative"):
        dh.sum().backward()


def test_bad_arguments():
    h, w, labels = inputs((6,))
    loss = kernels.linear_cross_entropy
    with pytest.raises(ValueError, match=r"hidden \(6, 23\) and weight \(130, 24\)"):
        loss(h[:, :23], w, labels)
    with pytest.raises(ValueError, match=r"labels \(5,\); hidden has tokens \(6,\)"):
        loss(h, w, labels[:5])
    with pytest.raises(TypeError, match=r"labels are torch.int32"):
        loss(h, w, labels.int())
    with pytest.raises(ValueError, match=r"reduction is 'max'"):
        loss(h, w, labels, reduction="max")
    with pytest.raises(ValueError, match=r"label_smoothing is 1"):
        loss(h, w, labels, label_smoothing=1.0)
    for name, value in (("logit_scale", math.nan), ("logit_scale", math.inf), ("z_loss", -1.0), ("z_loss", math.inf)):
        with pytest.raises(ValueError, match=rf"{name} is {value}; it must be finite"):
            loss(h, w, labels, **{name: value})
    with pytest.raises(TypeError, match=r"ignore_index is None; it must be an integer"):
        loss(h, w, labels, ignore_index=None)
    with pytest.raises(ValueError, match=r"chunk_size is 0"):
        loss(h, w, labels, chunk_size=0)
    with pytest.raises(TypeError, match=r"chunk_size is 1.5; it counts tokens: pass an integer"):
        loss(h, w, labels, chunk_size=1.5)
    with pytest.raises(ValueError, match=r"weight \(0, 24\); pass \(..., d\) and \(V, d\)"):
        loss(h, w[:0], labels)
    with (
        torch.autocast(h.device.type, torch.bfloat16),
        pytest.raises(TypeError, match=r"hidden is torch.int64; use float16"),
    ):
        loss(h.long(), w, labels)
    with pytest.raises(TypeError, match=r"mixed dtypes \(hidden torch.bfloat16, weight torch.float32\)"):
        loss(h.bfloat16(), w, labels)


@pytest.mark.cpu("torch's labels are checked where they are used, and Triton's give NaN")
@pytest.mark.parametrize("wrong", [130, -1])
def test_a_label_outside_the_vocabulary_is_named(wrong: int):
    h, w, labels = inputs((6,))
    labels[3] = wrong
    with pytest.raises(IndexError, match=rf"label {wrong} at position 3 of 6; labels are 0 to 129"):
        kernels.linear_cross_entropy(h, w, labels)
