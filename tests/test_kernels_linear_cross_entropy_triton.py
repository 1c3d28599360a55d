"""Linear + cross-entropy in its Triton kernel: the error rule with every option, vocabularies of several blocks and
ragged ones, labels that are ignored or wrong, huge and infinite logits, the boundary with autograd.
"""

import itertools
from functools import partial

import pytest
import torch
from device import size
from tolerance import compare, compare_pooled
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import reference
from kernels.linear_cross_entropy import _chunks, _Loss, _run_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
loss_of = partial(kernels.linear_cross_entropy, backend="triton")


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n: tuple[int, ...], d: int = 48, vocab: int = 300, ignored: float = 0.3):
    """The weight is uniform: then many of its elements, not one, decide the largest error of a gradient."""
    labels = torch.randint(vocab, n)
    labels[torch.rand(n) < ignored] = -100
    return torch.randn(*n, d), (torch.rand(vocab, d) - 0.5) * (12 / d) ** 0.5, labels


def leaves_of(n: tuple[int, ...], **kwargs):
    return tuple(t.requires_grad_() if t.is_floating_point() else t for t in inputs(n, **kwargs))


def both(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, **kwargs) -> None:
    plain = {k: v for k, v in kwargs.items() if k != "chunk_size"}
    ours = partial(loss_of, **kwargs)
    compare(ours, partial(reference.linear_cross_entropy, **plain), [h, w, labels], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("reduction", "chunk_size", "options"),
    [
        ("mean", None, {}),
        ("none", 40, {"logit_scale": 0.3}),
        ("sum", 40, {"label_smoothing": 0.1}),
        ("mean", 40, {"z_loss": 0.01}),
        ("none", None, {"logit_scale": 1.7, "label_smoothing": 0.2, "z_loss": 0.1}),
    ],
)
def test_outputs_and_gradients(reduction: str, chunk_size: int | None, options: dict, dtype: torch.dtype):
    both(*inputs((3, 33)), dtype, reduction=reduction, chunk_size=chunk_size, **options)


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 127, 128, 129, 257])
def test_vocabularies(vocab: int):
    """Around the multiples of a row's alignment and of a block."""
    smoothing = 0.0 if vocab == 1 else 0.1  # (1 - e) + e is not 1, and plain torch makes no error at all
    both(*inputs((40,), vocab=vocab), torch.float32, label_smoothing=smoothing)


@pytest.mark.parametrize("n", [(1,), (17,), (2, 3, 5)])
def test_lengths(n: tuple[int, ...]):
    draws = [inputs(n, vocab=100) for _ in range(80 // torch.Size(n).numel())]
    compare_pooled(partial(loss_of, chunk_size=16), reference.linear_cross_entropy, draws, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype: torch.dtype):
    h, w, labels = inputs((60,))
    both(h * 20, w, labels, dtype, z_loss=0.001)


def test_infinite_logits():
    """A logit of -inf is a word that is never chosen; a whole row of NaN spoils its own loss only."""
    h, w, labels = torch.ones(3, 1), torch.randn(300, 1), torch.tensor([5, 6, 7])
    w[:200] = -torch.inf
    w[5:8] = torch.tensor([[0.5], [0.2], [0.1]])
    expected = reference.linear_cross_entropy(h, w, labels, reduction="none")
    torch.testing.assert_close(loss_of(h, w, labels, reduction="none"), expected)
    h[1] = torch.nan
    loss = loss_of(h, w, labels, reduction="none")
    torch.testing.assert_close(loss[[0, 2]], expected[[0, 2]])
    assert loss[1].isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n", [5, 0])
def test_no_label_that_counts(reduction: str, n: int):
    h, w, _ = leaves_of((n,))
    loss = loss_of(h, w, torch.full((n,), -100), reduction=reduction, z_loss=0.1, label_smoothing=0.1)
    assert (loss == 0).all() and loss.shape == (() if reduction != "none" else (n,))
    dh, dw = torch.autograd.grad(loss.sum(), (h, w))
    assert (dh == 0).all() and (dw == 0).all()


def test_ignored_tokens_take_no_part_even_when_not_finite():
    h, w, labels = inputs((20,))
    bad = h.clone()
    bad[labels == -100] = torch.nan
    expected, got = (
        (loss, *torch.autograd.grad(loss, leaves))
        for leaves in ((h.requires_grad_(), w.requires_grad_()), (bad.requires_grad_(), w))
        for loss in [loss_of(*leaves, labels)]
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_another_ignore_index():
    h, w, labels = inputs((90,), ignored=0)
    for index in (1, 2**40):
        labels[:30] = index
        both(h, w, labels, torch.float32, ignore_index=index)


@pytest.mark.parametrize("wrong", [300, -1, 2**32 + 5])
def test_a_label_outside_the_vocabulary_gives_nan(wrong: int):
    h, w, labels = leaves_of((6,), ignored=0)
    labels[3] = wrong
    loss = loss_of(h, w, labels, reduction="none")
    assert loss.isnan().tolist() == [i == 3 for i in range(6)]
    dh, dw = torch.autograd.grad(loss.sum(), (h, w))
    assert dh.isnan().all(1).tolist() == [i == 3 for i in range(6)] and dw.isnan().all()
    assert loss_of(h, w, labels).isnan()


def test_strided_inputs_and_an_expanded_gradient():
    h, w, labels = inputs((30,))
    h, w, labels = (
        h.T.contiguous().T,
        torch.stack([w, w], 1)[:, 0],
        torch.stack([labels, labels], 1)[:, 0],
    )
    h, w = h.requires_grad_(), w.requires_grad_()
    none, total = (loss_of(h, w, labels, reduction=r) for r in ("none", "sum"))
    ours = torch.autograd.grad(none, (h, w), torch.ones(()).expand(30))
    for a, b in zip(ours, torch.autograd.grad(total, (h, w))):
        torch.testing.assert_close(a, b)


def test_frozen_weight_or_hidden():
    h, w, labels = inputs((20,))
    for frozen in (0, 1):
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((h, w))]
        (ours,) = torch.autograd.grad(loss_of(*leaves, labels), leaves[1 - frozen])
        (plain,) = torch.autograd.grad(reference.linear_cross_entropy(*leaves, labels), leaves[1 - frozen])
        torch.testing.assert_close(ours, plain)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(h, w, labels), reference.linear_cross_entropy(h, w, labels))


def test_weight_gradient_is_summed_in_fp32():
    """Many chunks of one token each, bf16: a sum kept in bf16 would stop growing."""
    h, w, labels = inputs((400,), 8, 20, 0)
    both(h, w, labels, torch.bfloat16, chunk_size=1, reduction="sum")


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of the largest tensor that any operation made, and the operations' names."""

    def __init__(self):
        super().__init__()
        self.size, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for t in torch.utils._pytree.tree_leaves(out):
            self.size = max(self.size, t.nbytes if isinstance(t, torch.Tensor) else 0)
        return out


def test_logits_never_exist_whole_and_nothing_waits():
    """64 tokens on 640 words in chunks of 16: nothing is larger than a chunk's logits or the weight. Nothing reads a
    value on the host or has a shape that depends on one.
    """
    h, w, labels = inputs((64,), 16, 640)
    with Seen() as seen, torch.no_grad():
        _run_triton(h, w, labels, _Loss(-100, 1.0, 0.1, 0.1), 16, (True, True), torch.ones(64))
    assert seen.size == 16 * 640 * 4
    assert not seen.names & {"_local_scalar_dense", "nonzero", "masked_select", "index", "item"}


def test_chunks_are_whole_tiles_within_the_limit():
    gpu = torch.device("cuda")
    for tokens, vocab, chunk_size in (
        (65536, 50368, None),
        (65536, 50277, 4000),
        (4097, 50368, None),
        (300, 50368, 100),
    ):
        ranges = _chunks(tokens, vocab, chunk_size, gpu, torch.bfloat16, 128)
        lengths = [j - i for i, j in ranges]
        assert ranges[0][0] == 0 and ranges[-1][1] == tokens and max(lengths) <= (chunk_size or 2**28 // vocab)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert max(lengths) < 128 or all(n % 128 == 0 for n in lengths[:-1])


def test_autocast():
    h, w, labels = leaves_of((40,))
    with torch.autocast(h.device.type, torch.bfloat16):
        loss = loss_of(h, w, labels)
    low = [t.detach().bfloat16().requires_grad_() for t in (h, w)]
    expected = loss_of(*low, labels)
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32
    for got, want in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, low)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str):
    h, w, labels = inputs((5,), vocab=20)
    h, w = h.bfloat16().requires_grad_(), w.bfloat16().requires_grad_()
    settings = (-100, 0.5, 0.1, 0.01, reduction, 4, True, True, True)
    torch.library.opcheck(torch.ops.mpt.linear_cross_entropy, (h, w, labels, *settings))
    with torch.no_grad():
        loss, *saved = torch.ops.mpt.linear_cross_entropy(h, w, labels, *settings)
        args = (torch.ones_like(loss), *saved, h.detach(), w.detach(), labels, *settings)
        torch.library.opcheck(torch.ops.mpt.linear_cross_entropy_backward, args)


def test_compile_and_checkpoint():
    torch._dynamo.reset()
    h, w, labels = leaves_of((10,), vocab=100)

    def step(h, w):
        return loss_of(h, w, labels) * 2

    expected = torch.autograd.grad(step(h, w), (h, w))
    checkpointed = partial(torch.utils.checkpoint.checkpoint, step, use_reentrant=False)
    for other in (torch.compile(step, backend="aot_eager", fullgraph=True), checkpointed):
        for got, want in zip(torch.autograd.grad(other(h, w), (h, w)), expected):
            torch.testing.assert_close(got, want)


# ---- as large as on a GPU: rows of many blocks -----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", size((50277, 50368), (300,)))
@pytest.mark.parametrize(
    ("reduction", "options"),
    [("mean", {}), ("none", {"logit_scale": 0.7, "label_smoothing": 0.1, "z_loss": 1e-3}), ("sum", {"z_loss": 1e-3})],
)
def test_rows_of_many_blocks(reduction: str, options: dict, vocab: int, dtype: torch.dtype):
    n, d, chunk_size = size((700, 256, 300), (50, 32, 20))
    both(*inputs((n,), d, vocab), dtype, reduction=reduction, chunk_size=chunk_size, **options)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31():
    """In one chunk, against the reference a few rows at a time, which would hold 17 GB of each step's logits whole."""
    n, few = size((2**31 // 50304 + 100, 4096), (90, 40))
    vocab = size(50277, 300)
    h, w, labels = inputs((n,), 64, vocab)

    def in_parts(h, w):
        parts = zip(h.split(few), labels.split(few))
        return torch.cat([checkpoint(plain, h_, w, labels_, use_reentrant=False) for h_, labels_ in parts])

    plain = partial(reference.linear_cross_entropy, reduction="none")
    compare(partial(loss_of, labels=labels, reduction="none", chunk_size=n), in_parts, [h, w], torch.bfloat16)
