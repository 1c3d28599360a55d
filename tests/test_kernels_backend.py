"""Which implementation runs, the one switch, and what every operation refuses."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import backend

X = torch.ones(2, 4)  # on the CPU, on every machine


@pytest.fixture(autouse=True)
def _default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MPT_KERNELS", raising=False)
    yield
    backend.set_default("auto")


def test_precedence(monkeypatch: pytest.MonkeyPatch):
    assert backend.choose("mlp", X) == "torch"
    backend.set_default("reference")
    assert backend.choose("mlp", X) == "reference"
    monkeypatch.setenv("MPT_KERNELS", "torch")
    assert backend.choose("mlp", X) == "torch"
    assert backend.choose("mlp", X, "reference") == "reference"
    assert backend.choose("mlp", X, "auto") == "torch"


@pytest.mark.parametrize("older", [False, True])
def test_what_torch_was_told_about_fp32(older: bool, monkeypatch: pytest.MonkeyPatch):
    """By either of its settings; the older cannot be read where the newer was set."""
    matmul, gpu = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.fp32_precision
    try:
        assert backend.fp32_products(gpu) == before
        if older:
            matmul.allow_tf32 = True
        else:
            matmul.fp32_precision = "tf32"
        assert backend.fp32_products(gpu) == "tf32"
        assert backend.fp32_products(torch.device("cpu")) == "ieee"
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert backend.fp32_products(gpu) == "none"
    finally:
        matmul.fp32_precision = before


def test_a_bad_name_says_where_it_came_from(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"backend is 'cuda'; it must be one of auto, triton, torch, reference"):
        kernels.layer_norm(X, X[0], backend="cuda")
    with pytest.raises(ValueError, match=r"kernels is 'fast'"):
        backend.set_default("fast")
    monkeypatch.setenv("MPT_KERNELS", "flash")
    with pytest.raises(ValueError, match=r"MPT_KERNELS is 'flash'"):
        kernels.layer_norm(X, X[0])


def test_what_triton_cannot_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    x = torch.ones(2, 4)
    monkeypatch.setenv("MPT_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"MPT_KERNELS is 'triton', but layer_norm cannot run there: .* is float64"):
        backend.choose("layer_norm", x.double())
    assert backend.choose("layer_norm", x) == "triton"
    with pytest.raises(ValueError, match=r"no room for that; use 'auto' or 'torch'"):
        backend.choose("layer_norm", x, unfit="no room for that")
    assert backend.choose("layer_norm", x, "auto", unfit="no room for that") == "torch"
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"the tensor is on meta, and Triton compiles for NVIDIA and AMD GPUs"):
        backend.choose("layer_norm", x.to("meta"))


def test_the_environment_reaches_every_operation(monkeypatch: pytest.MonkeyPatch):
    """With the reference every derivative exists."""
    monkeypatch.setenv("MPT_KERNELS", "reference")
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    for leaf, out in (
        (x, kernels.layer_norm(x, w[0])),
        (x, kernels.rms_norm(x, w[0])),
        (x, kernels.mlp(x, w, w.T.contiguous())),
        (x, kernels.linear_cross_entropy(x, w, torch.arange(3))),
        (q, kernels.flash_attention(q, q, q)),
    ):
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        assert second.isfinite().all()


def test_dtensors_are_refused_by_name():
    class DTensor(torch.Tensor):
        pass

    x = torch.randn(2, 4).as_subclass(DTensor)
    plain = torch.randn(4)
    q = torch.randn(1, 2, 1, 4)
    for call, name in (
        (lambda: kernels.layer_norm(x, plain), "x"),
        (lambda: kernels.rms_norm(plain[None], x[0]), "weight"),
        (lambda: kernels.mlp(plain[None], x, x.T), "up_weight"),
        (lambda: kernels.linear_cross_entropy(plain[None], x, torch.zeros(1).long()), "weight"),
        (lambda: kernels.flash_attention(q, q.as_subclass(DTensor), q), "k"),
        (lambda: kernels.lion_step([x], [x], [x], lr=0.1, betas=(0.9, 0.99), decay=0.0), r"params\[0\]"),
    ):
        with pytest.raises(TypeError, match=rf"{name} is a DTensor; pass its local part"):
            call()


def test_devices_must_agree():
    with pytest.raises(TypeError, match=r"weight is on meta and x on cpu"):
        kernels.layer_norm(X, X[0].to("meta"))


def test_operations_run_on_meta():
    """A model on meta gives shapes and dtypes, through the fakes."""
    x = torch.randn(2, 8, device="meta", requires_grad=True)
    w = torch.randn(16, 8, device="meta")
    q = torch.randn(2, 5, 4, 8, device="meta")
    slopes = kernels.alibi_slopes(4).to("meta")
    assert kernels.layer_norm(x, w[0]).shape == (2, 8)
    assert kernels.mlp(x, w, w.T).shape == (2, 8)
    assert kernels.linear_cross_entropy(x, w, torch.zeros(2, dtype=torch.long, device="meta")).shape == ()
    assert kernels.flash_attention(q, q, q, alibi_slopes=slopes).shape == q.shape
    assert kernels.layer_norm(x, w[0]).requires_grad


def test_importing_queries_no_device_and_stays_beside_transformers():
    """No CUDA initialisation on import; transformers does not take this package for Hugging Face's `kernels`."""
    code = (
        "import torch, kernels; assert not torch.cuda.is_initialized();"
        "from transformers.utils import import_utils;"
        "assert not import_utils.is_kernels_available()"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_foreign_kernels_distribution_is_warned_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"kernels": "0.10.0"}[name])
    with pytest.warns(UserWarning, match=r"pip uninstall kernels"):
        kernels._warn_of_namesake()


def test_no_warning_without_one():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels._warn_of_namesake()


def test_eager():
    """The operators' boundary is left out only where nobody needs it."""
    x, seen = torch.ones(3), []

    def look(y):
        seen.append(backend.eager(y))
        return y + 1

    assert not backend.eager(x)
    with torch.no_grad():
        assert backend.eager(x)
        assert not backend.eager(torch.nn.Parameter(x))
        with FakeTensorMode() as mode:
            assert not backend.eager(torch.ones(3))
        assert not backend.eager(mode.from_tensor(x))
        torch.compile(look, backend="eager", fullgraph=False)(x)
    assert seen[-1] is False


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_86"),
        ((12, 1), "sm_86"),
        ((13, 0), "sm_86"),
    ],
)
def test_each_gpu_from_sm_80_on_has_tiles(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch):
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert backend.architecture(torch.device("cuda")) == name
    assert (name in backend.TRITON_ARCHITECTURES) == (capability[0] >= 8)
