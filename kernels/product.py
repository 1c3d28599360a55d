"""The product of two matrices, a b^T, by the fastest library that sums in at least fp32.

torch sends low-precision products on a CPU to oneDNN and fp32 ones to MKL, which leaves half of an AMD processor's
speed unused (AVX-512) and is slow for a few rows there; on Intel's it is the fastest. So on others fp32 goes to oneDNN
as well, through the operation that torch's own compiler calls. For the few rows of a decoding step the weight is read
once and little computed: there its blocks of rows, as the left factors of a batch, stream a third faster than a few
rows times its transpose.
"""

import functools
import math
import platform
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 2**21  # multiplications below which the call's overhead decides
_TERMS = (1024, 8192)  # between these oneDNN sums terms one by one: summed in parts, the rounding error stays MKL's
_PART = 768
_FEW = 4  # rows, up to which the time is that of reading b; 1 where there are many terms
_SOME = 16  # rows, up to which copying parts of b costs more than it brings: the error is that of MKL for one row
_BLOCKS = 16
_LEAST_READ = 2**18  # elements of b


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, contiguous: a (M, K), b (N, K) -> (M, N), one floating dtype, any strides. Not differentiable."""
    (m, k), n = a.shape, b.shape[0]
    if a.device.type == "cpu" and mkl_at_its_best():
        return torch.mm(a, b.mT)
    few = _FEW if k <= _TERMS[0] else 1
    if m <= few and k < _TERMS[1] and n * k >= _LEAST_READ and _fp32_on_cpu(a) and b.is_contiguous():
        blocks = math.gcd(n, _BLOCKS)
        out = torch.bmm(b.view(blocks, -1, k), a.mT.expand(blocks, -1, -1))
        return out.view(n, m).mT.contiguous()
    if a.dtype != torch.float32 or m * n * k < _LEAST or not _onednn(a):
        return torch.mm(a, b.mT)
    linear = torch.ops.mkldnn._linear_pointwise
    if (rows := _rounded(m)) != m:
        a = F.pad(a, (0, 0, 0, rows - m))
    if m <= _SOME or not _TERMS[0] < k < _TERMS[1]:
        return linear(_dense(a), _dense(b), None, "none", [], "").narrow(0, 0, m)
    step = -(-k // -(-k // _PART))
    out = linear(_dense(a[:, :step]), _dense(b[:, :step]), None, "none", [], "")
    for i in range(step, k, step):
        out = linear.binary(_dense(a[:, i : i + step]), out, _dense(b[:, i : i + step]), None, "add")
    return out.narrow(0, 0, m)


@functools.cache
def mkl_at_its_best() -> bool:
    """Whether the processor is Intel's: on others MKL leaves out its fastest code."""
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    intel = re.search(r"^vendor_id\s*:\s*GenuineIntel$", about, re.M) is not None
    return intel and torch.backends.mkl.is_available()


def _rounded(rows: int) -> int:
    """At most 64 more, and at most an eighth. oneDNN keeps something for every shape that it has seen, and what it
    keeps lies between the results on the heap: where the number of tokens is another each time, memory would grow by
    megabytes a call.
    """
    step = min(64, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def _fp32_on_cpu(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu"


def _onednn(a: Tensor) -> bool:
    return a.device.type == "cpu" and platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()


def _dense(x: Tensor) -> Tensor:
    """x, or its transpose, without gaps: oneDNN is a thousand times slower on anything else."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()
