"""The operations of kernels against what else is installed, on this machine: time, rate, memory, error.

Attention against scaled_dot_product_attention (with a bias; forced cuDNN and flash without one, as a bound),
FlexAttention with ALiBi (with and without a BlockMask from our bound), transformers' plain form and torch.compile of
that; a query on a cache against the same; LayerNorm, MLP and linear + cross-entropy against plain torch, torch.compile
and Liger. Contenders take turns in one process and medians count. Backward is what forward and backward take together,
less forward. Errors are against float64, of the output and of the gradients, as a share of the largest element; of long
inputs, at some rows. Rates stand beside the measured rate of a copy and of a matrix product: "dense" ones count all the
work that attention without skipping has, "executed" ones what a contender does.
Example: python scripts/bench_kernels.py --op attention --seq-len 2048 8192 --head-dim 64 --threads 1 --cpu-time
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels
from kernels import reference
from kernels.alibi import GRAIN, Rules, first_kept

ROOT = Path(__file__).parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPERATIONS = ("attention", "decode_attention", "layer_norm", "mlp", "linear_cross_entropy")
USUAL = {"form": "causal", "norm": 25.0, "alibi_bias_max": 8.0}  # of attention; the rest is tried one by one
UNUSUAL = {"form": ("documents", "padded"), "norm": (11.0, 45.0), "alibi_bias_max": (16.0,)}
FLEX_BLOCK = 128  # queries and keys of a block of FlexAttention's BlockMask


@dataclass(frozen=True)
class Contender:
    """One way to do an operation. run: the forward, on a problem's tensors. bound: it does less than the others (no
    bias), and so has no error. backward: whether it has one here. executed: the share of the dense work that it does,
    2 where causal attention computes the invisible half as well. remark: for the report.
    """

    name: str
    run: Callable[[], Any]
    bound: bool = False
    backward: bool = True
    executed: float = 1.0
    remark: str = ""


class Exact(NamedTuple):
    """gradient: of the output. results: for the output and the gradient of each tensor, what they are in float64, and
    where that is found in a contender's.
    """

    gradient: Tensor | None
    results: list[tuple[Tensor, Callable[[Tensor], Tensor]]]


@dataclass
class Problem:
    """An operation at one size. tensors: those to differentiate for. flops, moved: of the dense forward and backward,
    operations and bytes.
    """

    op: str
    sizes: dict[str, Any]
    tensors: list[Tensor]
    contenders: list[Contender]
    flops: tuple[float, float] | None = None
    moved: tuple[float, float] | None = None
    exact: Callable[[], Exact] | None = None


@dataclass
class Result:
    """One contender on one problem; seconds by pass, each a list. note: why something is missing."""

    op: str
    sizes: dict[str, Any]
    name: str
    bound: bool
    executed: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory_mib: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    flops: tuple[float, float] | None = None
    moved: tuple[float, float] | None = None
    note: str = ""

    def median(self, which: str) -> float | None:
        """Seconds: of "forward" and "both" as measured; "backward" is the difference."""
        if which == "backward":
            forward, both = self.median("forward"), self.median("both")
            return None if forward is None or both is None else max(both - forward, 1e-9)
        return statistics.median(self.seconds[which]) if self.seconds.get(which) else None

    def rate(self, which: str, work: tuple[float, float] | None) -> float | None:
        """Of the dense work, per second."""
        seconds = self.median(which)
        if seconds is None or work is None:
            return None
        return {"forward": work[0], "backward": work[1], "both": sum(work)}[which] / seconds


def main() -> int:
    args = parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    about = describe_machine(args)
    results: list[Result] = []
    for problem in problems(args):
        found = measure(problem, args)
        results += found
        print(as_markdown(found, about), flush=True)
        rows = [asdict(r) for r in results]
        (args.out / "kernels.json").write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")
        del problem
        gc.collect()
    (args.out / "kernels.md").write_text(as_markdown(results, about))
    for path in plot(results, args.out):
        print(f"written: {path}", file=sys.stderr)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    lengths = [512, 2048, 8192, *([16384, 32768, 65536] if gpu else [])]
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--seq-len", type=int, nargs="+", default=lengths, help="of attention; elsewhere the tokens")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 112, 128] if gpu else [64])
    parser.add_argument("--heads", type=int, default=32 if gpu else 8)
    parser.add_argument("--batch", type=int, default=1)
    said = "(default: causal, norm 25 and alibi_bias_max 8, then each other form, norm 11 and 45, alibi_bias_max 16)"
    parser.add_argument("--form", nargs="+", choices=["causal", "documents", "padded"], help=f"of attention {said}")
    parser.add_argument("--norm", type=float, nargs="+", help="scale * |q| * |k|: 11, 25, 45 are seen")
    parser.add_argument("--alibi-bias-max", type=float, nargs="+", help="16 in StoryWriter")
    parser.add_argument("--d-model", type=int, default=4096 if gpu else 768)
    parser.add_argument("--vocab-size", type=int, default=50368)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16" if gpu else "fp32")
    parser.add_argument("--repeat", type=int, default=10 if gpu else 5, help="timed runs, after one untimed")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile has to build")
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--threads", type=int, help="torch's threads on a CPU (default: torch's choice)")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for a machine that is not idle")
    parser.add_argument(
        "--memory-gib", type=float, default=32.0 if gpu else 4.0, help="of one contender's score matrix"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="folder for kernels.json, kernels.md and plots (default: benchmarks/*)"
    )
    args = parser.parse_args()
    args.device = torch.device("cuda" if gpu else "cpu")
    args.out = args.out or ROOT / "benchmarks" / machine()
    return args


# ---- this machine
# -----------------------------------------------------------------------------------------------------


def machine() -> str:
    """A folder's name for this machine."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
        name = f"{model} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, with the rates of a copy (bytes read and written) and of a matrix product."""
    n, elements = (8192, 2**28) if args.device.type == "cuda" else (1536, 2**25)
    dtype = DTYPES[args.dtype]
    a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
    source = torch.randn(elements, device=args.device)
    target = torch.empty_like(source)
    multiply = statistics.median(timed(lambda: torch.mm(a, b), args) for _ in range(7))
    copy = statistics.median(timed(lambda: target.copy_(source), args) for _ in range(7))
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "threads": torch.get_num_threads() if args.device.type == "cpu" else None,
        "cpu_time": args.cpu_time,
        "seed": args.seed,
        "copy_bytes_per_s": 2 * source.nbytes / copy,
        "matmul_flops_per_s": 2 * n**3 / multiply,
    }


def timed(run: Callable[[], Any], args: argparse.Namespace) -> float:
    """Seconds of one run. On a GPU its second-level cache is emptied before."""
    if args.device.type == "cuda":
        torch.empty(2**28, dtype=torch.int8, device=args.device).zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    clock = time.process_time if args.cpu_time else time.perf_counter
    start = clock()
    run()
    return clock() - start


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Memory above what there was before, at the peak of a run; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the last run gave back to the C library would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    except (OSError, AttributeError):
        return None
    status = Path("/proc/self/status")
    before = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])
    run()
    return (int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) - before) / 2**10


# ---- measuring
# --------------------------------------------------------------------------------------------------------


def measure(problem: Problem, args: argparse.Namespace) -> list[Result]:
    """Every contender, in turns; one that fails is in the results with the reason."""
    results, passes = [], {}
    expected = problem.exact() if problem.exact else None
    for contender in problem.contenders:
        result = Result(problem.op, problem.sizes, contender.name, contender.bound, contender.executed)
        result.note = contender.remark
        result.flops, result.moved = problem.flops, problem.moved
        results.append(result)
        try:
            with_backward = contender.backward and not args.no_backward
            runs = make_passes(contender, problem.tensors, with_backward)
            for run in runs.values():
                run()
            if expected and not contender.bound:
                result.error, result.gradient_error = errors(contender, problem.tensors, expected, with_backward)
            result.memory_mib = peak_mib(list(runs.values())[-1], args.device)
            passes[contender.name] = runs
        except Exception as e:  # a peer that cannot do this: it is reported, and the others go on
            result.note = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:160]
    for _ in range(args.repeat):
        for result in results:
            for which, run in passes.get(result.name, {}).items():
                result.seconds.setdefault(which, []).append(timed(run, args))
    return results


def errors(contender: Contender, tensors: list[Tensor], expected: Exact, backward: bool) -> tuple[float, float | None]:
    """Of the output, and the worst of the gradients."""
    out = contender.run()
    got = [out.detach()]
    if backward:
        given = torch.ones_like(out) if expected.gradient is None else expected.gradient.to(out.dtype)
        got += torch.autograd.grad(out, tensors, given)
    found = [
        ((part(x).double() - exact).abs().max() / exact.abs().max()).item()
        for x, (exact, part) in zip(got, expected.results)
    ]
    return found[0], max(found[1:]) if backward else None


def make_passes(contender: Contender, tensors: list[Tensor], backward: bool) -> dict[str, Callable[[], Any]]:
    """The forward, as training does it if there is a backward; and both together."""
    if not backward:
        return {"forward": without_gradients(contender.run)}
    shape = contender.run()
    gradient = torch.randn_like(shape)
    return {
        "forward": contender.run,
        "both": lambda: torch.autograd.grad(contender.run(), tensors, gradient, allow_unused=True),
    }


def without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return run()

    return forward


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(run, dynamic=False)


# ---- the problems
# -----------------------------------------------------------------------------------------------------


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    if "attention" in args.op:
        for case, d, s in product(cases(args), args.head_dim, args.seq_len):
            yield attention(args, s, d, **case)
    if "decode_attention" in args.op:
        plain = [case for case in cases(args) if case["form"] == "causal"]
        for case, d, s in product(plain, args.head_dim, args.seq_len):
            yield decode_attention(args, s, d, case["norm"], case["alibi_bias_max"])
    for tokens in args.seq_len:
        for make in (layer_norm, mlp, linear_cross_entropy):
            if make.__name__ in args.op:
                yield make(args, tokens)


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Attention's forms, norms and alibi_bias_max: as asked, in every combination; else one at a time."""
    asked = {name: values for name in USUAL if (values := getattr(args, name))}
    if asked:
        every = [asked.get(name, [usual]) for name, usual in USUAL.items()]
        return [dict(zip(USUAL, values)) for values in product(*every)]
    return [USUAL, *(USUAL | {name: value} for name, values in UNUSUAL.items() for value in values)]


def leaf(args: argparse.Namespace, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=args.device) * scale).to(DTYPES[args.dtype]).requires_grad_()


def attention(args: argparse.Namespace, s: int, d: int, form: str, norm: float, alibi_bias_max: float) -> Problem:
    """q, k of the given scale * |q| * |k|, as normal vectors; documents of S / 8 on average, or a quarter padded."""
    b, h, device = args.batch, args.heads, args.device
    drawn = (norm / d**0.5) ** 0.5  # normal q and k have scale * |q| * |k| = sqrt(d)
    q, k = (leaf(args, b, s, h, d, scale=drawn) for _ in range(2))
    v = leaf(args, b, s, h, d)
    slopes = kernels.alibi_slopes(h, alibi_bias_max).to(device)
    masks: dict[str, Tensor] = {}
    if form == "documents":
        starts = torch.rand(b, s, device=device) < 8 / s
        masks["sequence_id"] = starts.cumsum(1)
    elif form == "padded":
        masks["attention_mask"] = (torch.arange(s, device=device) < max(1, 3 * s // 4)).expand(b, s)
    given: dict[str, Any] = {"alibi_slopes": slopes, **masks}

    def ours(skip: bool = True) -> Callable[[], Any]:
        return lambda: kernels.flash_attention(q, k, v, skip=skip, **given)

    def kept(skip: bool) -> float:
        with torch.no_grad():
            return float(kernels.flash_attention(q, k, v, skip=skip, return_kept=True, **given)[1])

    contenders = [Contender("ours", ours(), executed=kept(True))]
    contenders.append(Contender("ours, no skipping", ours(skip=False), executed=kept(False)))
    bias_bytes = b * h * s * s * max(4, q.element_size())
    if bias_bytes <= args.memory_gib * 2**30:
        contenders += with_a_bias(q, k, v, slopes, masks, args)
    if form == "causal":
        contenders += without_a_bias(q, k, v)
    if not args.no_compile:
        contenders += flex(q, k, v, slopes, masks, args)

    rows = torch.linspace(0, s - 1, min(s, 16)).long().tolist()

    def exact() -> Exact:
        q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
        attend: Any = reference.flash_attention
        parts = [attend(q64[:, r : r + 1], k64, v64, query_offset=r, **given) for r in rows]
        seen = masks.get("attention_mask", torch.ones(b, s, dtype=torch.bool, device=device))[:, rows, None, None]
        out = torch.cat(parts, 1) * seen
        gradient = torch.zeros_like(v)
        gradient[:, rows] = torch.randn_like(v[:, rows]) * seen
        grads = torch.autograd.grad(out, (q64, k64, v64), gradient[:, rows].double())
        whole = [(x, lambda grad: grad) for x in grads]
        return Exact(gradient, [(out.detach(), lambda out: out[:, rows] * seen), *whole])

    forward = 2 * b * h * s * s * d  # two products over the causal half
    sizes = {"s": s, "d": d, "heads": h, "batch": b, "form": form, "norm": norm, "alibi_bias_max": alibi_bias_max}
    return Problem("attention", sizes, [q, k, v], contenders, flops=(forward, 2.5 * forward), exact=exact)


def visible(s: int, masks: dict[str, Tensor], device: torch.device) -> Tensor:
    """(B or 1, 1, S, S) bool."""
    see = torch.ones(s, s, dtype=torch.bool, device=device).tril()[None, None]
    if "sequence_id" in masks:
        ids = masks["sequence_id"]
        see = see & (ids[:, None, :, None] == ids[:, None, None, :])
    if "attention_mask" in masks:
        see = see & masks["attention_mask"][:, None, None, :]
    return see


def with_a_bias(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, masks: dict[str, Tensor], args: argparse.Namespace
) -> list[Contender]:
    """What takes ALiBi and the masks as one (B, H, S, S) tensor, made beforehand."""
    s, d = q.shape[1], q.shape[3]
    position = torch.arange(s, device=q.device)
    away = (position[:, None] - position).float()
    bias = (-slopes[:, None, None] * away).masked_fill(~visible(s, masks, q.device), float("-inf")).to(q.dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        scores = qt @ kt.transpose(2, 3) * d**-0.5 + bias
        return (scores.float().softmax(-1).to(vt.dtype) @ vt).transpose(1, 2)

    def sdpa() -> Tensor:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(qt, kt, vt, attn_mask=bias).transpose(1, 2)

    beside = f"beside it the bias, {bias.nbytes / 2**20:.0f} MiB"
    found = [Contender("eager, as transformers", lambda: eager(q, k, v), executed=2.0, remark=beside)]
    if not args.no_compile:
        built = compiled(eager)
        found.append(Contender("torch.compile", lambda: built(q, k, v), executed=2.0, remark=beside))
    return [*found, Contender("SDPA with a bias", sdpa, executed=2.0, remark=beside)]


def without_a_bias(q: Tensor, k: Tensor, v: Tensor) -> list[Contender]:
    """Causal attention without ALiBi: no contender, but what libraries reach."""
    backends: dict[str, SDPBackend] = {"flash": SDPBackend.FLASH_ATTENTION}
    if q.device.type == "cuda":
        backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION

    def forced(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(qt, kt, vt, is_causal=True).transpose(1, 2)

        return run

    return [Contender(f"SDPA {name}, no ALiBi", forced(b), bound=True) for name, b in backends.items()]


def flex(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, masks: dict[str, Tensor], args: argparse.Namespace
) -> list[Contender]:
    """FlexAttention; with the blocks that are visible, and with those that our bound keeps. None for ragged lengths.

    On a CPU it has no backward, and its inputs may not ask for one.
    """
    b, s, h, d = q.shape
    if s % FLEX_BLOCK:
        return []
    on_gpu = q.device.type == "cuda"

    def score(scores: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return scores - slopes[head] * (i - j)

    ids, valid = masks.get("sequence_id"), masks.get("attention_mask")

    def mask(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        see = i >= j
        if ids is not None:
            see = see & (ids[batch, i] == ids[batch, j])
        if valid is not None:
            see = see & valid[batch, j]
        return see

    tiles = s // FLEX_BLOCK
    rules = Rules(True, None, 0, valid, ids, None)
    scaled, keys = (x.detach().permute(2, 0, 1, 3).reshape(h * b, s, d) for x in (q * d**-0.5, k))
    folded = slopes.repeat_interleave(b)[:, None]
    starts = first_kept(scaled[:, None], keys, folded, rules, chunk=FLEX_BLOCK, bits=24)
    kept_from = starts.view(h, b, tiles).transpose(0, 1) // FLEX_BLOCK
    visible_from = torch.zeros_like(kept_from)
    if ids is not None:  # the block in which the document of a tile's first query begins
        begins = torch.searchsorted(ids, ids[:, ::FLEX_BLOCK].contiguous()) // FLEX_BLOCK
        visible_from = begins[:, None].expand(b, h, tiles).int()
    attend = compiled(flex_attention)
    found = []
    both = torch.maximum(kept_from, visible_from)
    for name, first in (("FlexAttention", visible_from), ("FlexAttention, our blocks", both)):
        blocks = block_mask(first, mask, all_partial=bool(masks))
        share = float((torch.arange(tiles, device=q.device) + 1 - first).sum() / (b * h * tiles * (tiles + 1) / 2))

        def run(blocks: BlockMask = blocks) -> Tensor:
            inputs = (x.transpose(1, 2) if on_gpu else x.detach().transpose(1, 2) for x in (q, k, v))
            return attend(*inputs, score_mod=score, block_mask=blocks).transpose(1, 2)

        found.append(
            Contender(name, run, backward=on_gpu, executed=share, remark="" if on_gpu else "no backward on a CPU")
        )
    return found


def block_mask(first: Tensor, mask: Callable[..., Tensor], all_partial: bool) -> BlockMask:
    """first (B, H, S / 128): each row of blocks has those from there to its diagonal. Only the diagonal one needs the
    mask, unless all_partial.
    """
    tiles = first.shape[-1]
    block = torch.arange(tiles, device=first.device)
    from_first = (first[..., None] + block).clamp(max=tiles - 1).int()
    count = (block + 1 - first).int()
    if all_partial:
        return BlockMask.from_kv_blocks(count, from_first, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask)
    diagonal = (block[:, None] + block).clamp(max=tiles - 1).expand_as(from_first).int().contiguous()
    one = torch.ones_like(count)
    return BlockMask.from_kv_blocks(one, diagonal, count - 1, from_first, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask)


def decode_attention(args: argparse.Namespace, keys: int, d: int, norm: float, alibi_bias_max: float) -> Problem:
    """The newest query of each row on a full cache. GB/s: of the cache, read once."""
    b, h, device, dtype = args.batch, args.heads, args.device, DTYPES[args.dtype]
    drawn = (norm / d**0.5) ** 0.5
    q = (torch.randn(b, 1, h, d, device=device) * drawn).to(dtype)
    k, v = ((torch.randn(b, h, keys, d, device=device) * size).to(dtype) for size in (drawn, 1.0))
    slopes = kernels.alibi_slopes(h, alibi_bias_max).to(device)
    lengths = torch.full((b,), keys, device=device)
    norms = torch.zeros(b, h, -(-keys // GRAIN), device=device)
    kernels.update_key_norms(norms, k, 0)
    bias = (slopes[:, None, None] * torch.arange(1 - keys, 1, device=device)).to(dtype)

    def ours(key_norms: Tensor | None, **asked: Any) -> Any:
        return kernels.decode_attention(q, k, v, lengths, alibi_slopes=slopes, key_norms=key_norms, **asked)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.transpose(1, 2) @ k.transpose(2, 3) * d**-0.5 + bias
        return (scores.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bias).transpose(1, 2)

    kept = float(ours(norms, return_kept=True)[1])
    contenders = [Contender("ours", lambda: ours(norms), backward=False, executed=kept)]
    contenders.append(Contender("ours, no skipping", lambda: ours(None), backward=False))
    contenders.append(Contender("eager, as transformers", lambda: eager(q, k, v), backward=False))
    contenders.append(Contender("SDPA with a bias", sdpa, backward=False))
    if not args.no_compile:
        built, attend = compiled(eager), compiled(flex_attention)

        def score(scores: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return scores - slopes[head] * (keys - 1 - j)

        def flexible() -> Any:
            return attend(q.transpose(1, 2), k, v, score_mod=score).transpose(1, 2)

        contenders.append(Contender("torch.compile", lambda: built(q, k, v), backward=False))
        contenders.append(Contender("FlexAttention", flexible, backward=False))

    def exact() -> Exact:
        attend: Any = reference.decode_attention
        expected = attend(q.double(), k.double(), v.double(), lengths, alibi_slopes=slopes)
        return Exact(None, [(expected, lambda out: out)])

    sizes = {"keys": keys, "d": d, "heads": h, "batch": b, "norm": norm, "alibi_bias_max": alibi_bias_max}
    moved = (float(k.nbytes + v.nbytes), 0.0)
    return Problem("decode_attention", sizes, [], contenders, moved=moved, exact=exact)


def layer_norm(args: argparse.Namespace, tokens: int) -> Problem:
    d = args.d_model
    x, weight, bias = leaf(args, tokens, d), leaf(args, d), leaf(args, d)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (d,), weight, bias)

    contenders = [Contender("ours", lambda: kernels.layer_norm(x, weight, bias))]
    contenders.append(Contender("torch", lambda: plain(x, weight, bias)))
    if not args.no_compile:
        built = compiled(plain)
        contenders.append(Contender("torch.compile", lambda: built(x, weight, bias)))
    if args.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_layer_norm

        contenders.append(Contender("Liger", lambda: liger_layer_norm(x, weight, bias, 1e-5)))

    def exact() -> Exact:
        return exact_at_first_rows(reference.layer_norm, [x, weight, bias], 256)

    moved = (2.0 * x.nbytes, 3.0 * x.nbytes)  # forward x, y; backward x, dy, dx
    return Problem("layer_norm", {"tokens": tokens, "d": d}, [x, weight, bias], contenders, moved=moved, exact=exact)


def exact_at_first_rows(function: Callable[..., Any], tensors: list[Tensor], rows: int) -> Exact:
    """Of an operation on rows: the first of them, with no gradient given to the others."""
    first, *weights = (x.detach().double() for x in (tensors[0][:rows], *tensors[1:]))
    leaves = [x.requires_grad_() for x in (first, *weights)]
    out = function(*leaves)
    gradient = torch.zeros_like(tensors[0])
    gradient[:rows] = torch.randn_like(gradient[:rows])
    grads = torch.autograd.grad(out, leaves, gradient[:rows].double())
    found = [(x, lambda got: got[:rows]) for x in (out.detach(), grads[0])]
    return Exact(gradient, [*found, *((x, lambda got: got) for x in grads[1:])])


def mlp(args: argparse.Namespace, tokens: int) -> Problem:
    d = args.d_model
    x, up, down = leaf(args, tokens, d), leaf(args, 4 * d, d, scale=d**-0.5), leaf(args, d, 4 * d, scale=d**-0.5)

    def plain(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.gelu(x @ up.T) @ down.T

    contenders = [Contender("ours", lambda: kernels.mlp(x, up, down))]
    contenders.append(Contender("torch", lambda: plain(x, up, down)))
    if not args.no_compile:
        built = compiled(plain)
        contenders.append(Contender("torch.compile", lambda: built(x, up, down)))

    def exact() -> Exact:
        return exact_at_first_rows(reference.mlp, [x, up, down], 64)

    flops = (16.0 * tokens * d * d, 32.0 * tokens * d * d)
    return Problem("mlp", {"tokens": tokens, "d": d}, [x, up, down], contenders, flops=flops, exact=exact)


def linear_cross_entropy(args: argparse.Namespace, tokens: int) -> Problem:
    d, vocabulary = args.d_model, args.vocab_size
    hidden, weight = leaf(args, tokens, d), leaf(args, vocabulary, d, scale=d**-0.5)
    labels = torch.randint(vocabulary, (tokens,), device=args.device)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels)

    contenders = [Contender("ours", lambda: kernels.linear_cross_entropy(hidden, weight, labels))]
    if 3 * tokens * vocabulary * 4 <= args.memory_gib * 2**30:
        contenders.append(Contender("torch", lambda: plain(hidden, weight)))
        if not args.no_compile:
            built = compiled(plain)
            contenders.append(Contender("torch.compile", lambda: built(hidden, weight)))
    if args.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        contenders.append(Contender("Liger", lambda: liger_fused_linear_cross_entropy(hidden, weight, labels)))

    def exact() -> Exact:
        """The gradients at 64 tokens, and at 1024 of the vocabulary."""
        w64, total = weight.detach().double(), torch.zeros((), dtype=torch.float64, device=args.device)
        dh, dw = torch.zeros_like(w64[:0]), torch.zeros_like(w64[:1024])
        for rows in torch.arange(tokens, device=args.device).split(1024):
            h64 = hidden.detach()[rows].double()
            logits = h64 @ w64.T
            total += F.cross_entropy(logits, labels[rows], reduction="sum")
            d_logits = logits.softmax(-1) / tokens
            d_logits[torch.arange(len(rows), device=args.device), labels[rows]] -= 1 / tokens
            dw += d_logits[:, :1024].T @ h64
            dh = dh if len(dh) else d_logits[:64] @ w64
        grads = [(dh, lambda got: got[:64]), (dw, lambda got: got[:1024])]
        return Exact(None, [(total / tokens, lambda loss: loss), *grads])

    flops = (2.0 * tokens * d * vocabulary, 4.0 * tokens * d * vocabulary)
    sizes = {"tokens": tokens, "d": d, "vocabulary": vocabulary}
    return Problem("linear_cross_entropy", sizes, [hidden, weight], contenders, flops=flops, exact=exact)


# ---- the report
# -------------------------------------------------------------------------------------------------------


def as_markdown(results: Sequence[Result], about: dict[str, Any]) -> str:
    """A table for each problem."""
    out = []
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(f"{r.op}: {', '.join(f'{k} {v}' for k, v in r.sizes.items())}", []).append(r)
    for title, group in groups.items():
        by_flops = group[0].flops is not None
        unit, peak = ("TFLOP/s", "matmul_flops_per_s") if by_flops else ("GB/s", "copy_bytes_per_s")
        heads = ["", "forward, ms", "backward, ms", "both, ms", f"dense {unit}: forward", "backward", "both"]
        heads += ["executed", f"{unit} executed", f"of {'a matmul' if by_flops else 'a copy'}"]
        heads += ["memory, MiB", "error", "of gradients", "remarks"]
        out += [f"### {title}\n", row(heads), row(["---"] * len(heads))]
        out += [row(cells(r, about[peak], 1e12 if by_flops else 1e9)) for r in group]
        out.append("")
    return "\n".join(out)


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(r: Result, peak: float, unit: float) -> list[str]:
    def shown(x: float | None, form: str) -> str:
        return "" if x is None else format(x, form)

    def ms(which: str) -> str:
        seconds = r.median(which)
        return "" if seconds is None else f"{seconds * 1e3:.3f}"

    work = r.flops or r.moved
    which = "both" if r.seconds.get("both") else "forward"
    rate = r.rate(which, work)
    executed = None if rate is None else rate * r.executed
    return [
        r.name,
        *(ms(w) for w in ("forward", "backward", "both")),
        *("" if (x := r.rate(w, work)) is None else f"{x / unit:.3g}" for w in ("forward", "backward", "both")),
        shown(r.executed, ".0%"),
        shown(None if executed is None else executed / unit, ".3g"),
        shown(None if executed is None else executed / peak, ".0%"),
        shown(r.memory_mib, ".0f"),
        shown(r.error, ".1e"),
        shown(r.gradient_error, ".1e"),
        "; ".join(filter(None, ["does less: no ALiBi" if r.bound else "", r.note])).replace("|", " "),
    ]


def plot(results: Sequence[Result], folder: Path) -> list[Path]:
    """Milliseconds over the length, a picture for each operation and what else differs; single lengths give none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, list[Result]] = {}
    for r in results:
        rest = [f"{k}-{v:g}" if isinstance(v, float) else f"{k}-{v}" for k, v in r.sizes.items()]
        groups.setdefault("-".join([r.op, *rest[1:]]), []).append(r)
    written = []
    for name, group in groups.items():
        length = next(iter(group[0].sizes))
        if len({r.sizes[length] for r in group}) < 2:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        for axis, which in zip(axes, ("forward", "both")):
            for contender in dict.fromkeys(r.name for r in group):
                points = [(r.sizes[length], r.median(which)) for r in group if r.name == contender]
                drawn = [(x, y * 1e3) for x, y in points if y is not None]
                if drawn:
                    axis.plot(*zip(*drawn), marker="o", label=contender)
            axis.set(xscale="log", yscale="log", xlabel=length, ylabel="ms", title=f"{which} (both: with backward)")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        figure.suptitle(name)
        path = folder / f"kernels-{name}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        written.append(path)
    return written


if __name__ == "__main__":
    sys.exit(main())
