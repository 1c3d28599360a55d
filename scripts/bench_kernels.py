"""The operations of kernels against what else is installed, on this machine: time, rate, memory, error.

Attention against scaled_dot_product_attention (with a bias; forced cuDNN and flash without one, as a bound),
FlexAttention with ALiBi (with and without a BlockMask from our bound), transformers' plain form and torch.compile of
that; a query on a cache against the same; LayerNorm, MLP and linear + cross-entropy against plain torch, torch.compile
and Liger. Contenders take turns in one process and medians count. Backward is what forward and backward take together,
less forward. Errors are against float64, of the output and of the gradients, as a share of the largest element; of long
inputs, at some rows. Rates stand beside the measured rate of a copy and of a matrix product: "dense" ones count all the
work that attention without skipping has, "executed" ones what a contender does.

A run adds to what its folder holds, newer figures in place of older ones, and writes after each problem. So a long list
can be measured in slices: repeat `--resume --minutes 9`, or name an --op, sizes and a --contender.
Example: python scripts/bench_kernels.py --op attention --seq-len 2048 8192 --head-dim 64 --threads 1 --cpu-time
"""

import argparse
import ctypes
import functools
import gc
import importlib.util
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels
from kernels import reference
from kernels.alibi import GRAIN, Rules, first_kept
from kernels.backend import choose
from kernels.mlp import only
from scripts.bench_report import INPUTS, Result, as_markdown, load, merged, plot, save

ROOT = Path(__file__).parent.parent
T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPERATIONS = ("attention", "decode_attention", "layer_norm", "mlp", "linear_cross_entropy")
USUAL = {"form": "causal", "norm": 25.0, "alibi_bias_max": 8.0}  # of attention; the rest is tried one by one
UNUSUAL = {"form": ("documents", "padded"), "norm": (11.0, 45.0), "alibi_bias_max": (16.0,)}
FLEX_BLOCK = 128  # queries and keys of a block of FlexAttention's BlockMask
HEAD_START = 6e-3  # seconds that a GPU is kept busy while the host launches; an operator's boundary takes 2e-4 of it


class Absent(Exception):
    """A contender cannot take part, for a reason that is no failure."""


class BrokenDevice(Exception):
    """A kernel's fault: the GPU refuses all further work of this process. result: of the contender that did it."""

    def __init__(self, result: Result) -> None:
        super().__init__(f"{result.problem}: {result.name}: {result.note}")
        self.result = result


@dataclass(frozen=True)
class Way:
    """How to do an operation. run: the forward, on a problem's tensors. executed: the share of the dense work that it
    does, 2 where causal attention computes the invisible half as well. backward: whether it has one here. split: False
    where the forward computes the gradients. within: what forward and backward run in. implementation: of ours.
    """

    run: Callable[[], Any]
    executed: float = 1.0
    backward: bool = True
    split: bool = True
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    implementation: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Contender:
    """build: makes what it needs besides the problem's tensors, and may fail. bound: it does less than the others (no
    bias), and so has no error.
    """

    name: str
    build: Callable[[], Way]
    bound: bool = False


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

    tensors: list[Tensor]
    contenders: list[Contender]
    exact: Callable[[], Exact]
    flops: tuple[float, float] | None = None
    moved: tuple[float, float] | None = None


def main() -> int:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    about, status = describe(args), 0
    try:
        results = load(args.out, about)
    except ValueError as e:
        sys.exit(str(e))
    args.out.mkdir(parents=True, exist_ok=True)
    about |= measure_peaks(args)
    try:
        for rows in measure_all(args, about, {(r.problem, r.name) for r in results}):
            results = merged(results, rows)
            save(results, about, args.out)
            print(as_markdown(rows), flush=True)
    except BrokenDevice as e:
        results = merged(results, [e.result])
        save(results, about, args.out)
        print(f"{e}\nNothing runs on the GPU after that: start again without this contender", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    for path in plot(results, args.out):
        print(f"written: {path}", file=sys.stderr)
    return status


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
    parser.add_argument("--repeat", type=int, default=10 if gpu else 5, help="timed runs, after untimed ones")
    parser.add_argument("--contender", nargs="+", help="only those whose name, as the tables have it, contains one")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile has to build")
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--minutes", type=float, help="begin no further problem after so long")
    parser.add_argument("--resume", action="store_true", help="leave out the contenders that --out has a row of")
    parser.add_argument("--threads", type=int, help="torch's threads on a CPU (default: torch's choice)")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for a machine that is not idle")
    parser.add_argument(
        "--memory-gib", type=float, default=32.0 if gpu else 4.0, help="of one contender's score matrix"
    )
    parser.add_argument("--seed", type=int, default=0)
    said = "folder for kernels.json, kernels.md and plots (default: benchmarks/ and this machine's name)"
    parser.add_argument("--out", type=Path, help=said)
    args = parser.parse_args()
    args.device = torch.device("cuda" if gpu else "cpu")
    args.out = args.out or ROOT / "benchmarks" / machine()
    return args


# ---- this machine ----------------------------------------------------------------------------------------------------


def machine() -> str:
    """A folder's name for this machine."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
        name = f"{model} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, besides what is measured."""
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": args.dtype,
        "threads": torch.get_num_threads() if args.device.type == "cpu" else None,
        "cpu_time": args.cpu_time,
        "seed": args.seed,
        "MPT_KERNELS": os.environ.get("MPT_KERNELS"),
    }


def measure_peaks(args: argparse.Namespace) -> dict[str, float]:
    """The rates of a copy (bytes read and written) and of a matrix product."""
    n, elements = (8192, 2**28) if args.device.type == "cuda" else (1536, 2**25)
    a, b = (torch.randn(n, n, device=args.device, dtype=DTYPES[args.dtype]) for _ in range(2))
    source = torch.randn(elements, device=args.device)
    target = torch.empty_like(source)
    multiply = statistics.median(timed(lambda: torch.mm(a, b), args)[0] for _ in range(7))
    copy = statistics.median(timed(lambda: target.copy_(source), args)[0] for _ in range(7))
    return {"copy_bytes_per_s": 2 * source.nbytes / copy, "matmul_flops_per_s": 2 * n**3 / multiply}


def timed(run: Callable[[], Any], args: argparse.Namespace) -> tuple[float, float | None]:
    """Seconds of one run; on a GPU, its second-level cache emptied before, also those in which the host launched it.

    The GPU sleeps meanwhile. Else it would wait for the host between short kernels, and the host would be measured.
    """
    if args.device.type == "cuda":
        torch.empty(2**28, dtype=torch.int8, device=args.device).zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(head_start_cycles())
        begin.record()
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, host
    clock = time.process_time if args.cpu_time else time.perf_counter
    start = clock()
    run()
    return clock() - start, None


@functools.cache
def head_start_cycles() -> int:
    """HEAD_START in the cycles that torch.cuda._sleep counts. The clock of an idle GPU is slow at first."""
    cycles, took = 1_000_000, []
    for _ in range(50):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3)
    return int(cycles * HEAD_START / min(took))


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


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace, about: dict[str, Any], had: set[tuple[str, str]]) -> Iterator[list[Result]]:
    """The rows of one problem after the other. had: problems and names of the rows that there are, for --resume."""
    start, names, met = time.monotonic(), set(), False
    todo = plan(args)
    for n, (op, sizes) in enumerate(todo):
        if args.minutes is not None and time.monotonic() - start > args.minutes * 60:
            print(f"{args.minutes:g} minutes are over; {len(todo) - n} of {len(todo)} problems left", file=sys.stderr)
            return
        blank = Result(op, sizes, INPUTS)
        print(f"{n + 1} of {len(todo)}, {blank.problem}", file=sys.stderr)
        torch.manual_seed(args.seed)  # the same inputs in every slice
        problem = attempt(blank, args.device, functools.partial(PROBLEMS[op], args, **sizes))
        if problem is None:
            yield [blank]
            continue
        names |= {c.name for c in problem.contenders}
        asked = [c for c in problem.contenders if asked_for(c.name, args.contender)]
        met = met or bool(asked)
        problem.contenders = [c for c in asked if not (args.resume and (blank.problem, c.name) in had)]
        if problem.contenders:
            yield measure(op, sizes, problem, args, about)
        del problem, asked
        release(blank, args.device)
    if names and not met:
        sys.exit(f"--contender {' '.join(args.contender)}: there are {', '.join(sorted(names))}")


def asked_for(name: str, parts: list[str] | None) -> bool:
    return parts is None or any(part.lower() in name.lower() for part in parts)


def measure(
    op: str, sizes: dict[str, Any], problem: Problem, args: argparse.Namespace, about: dict[str, Any]
) -> list[Result]:
    """Every contender, in turns; one that fails, at any time, is in the results with the reason."""
    if not args.no_compile:
        torch._dynamo.reset()  # or the limit of recompilations is reached
    unknown = Result(op, sizes, INPUTS)
    expected = attempt(unknown, args.device, problem.exact)
    results, passes = [], {}
    for contender in problem.contenders:
        result = Result(op, sizes, contender.name, contender.bound, flops=problem.flops, moved=problem.moved)
        result.peak = about["matmul_flops_per_s" if problem.flops else "copy_bytes_per_s"]
        results.append(result)
        runs = attempt(result, args.device, functools.partial(warm_up, contender, problem, expected, result, args))
        if runs is not None:
            passes[contender.name] = runs
            if expected is None and not contender.bound:
                result.note = "; ".join(filter(None, [result.note, f"no float64: {unknown.note}"]))
    del expected
    for _ in range(args.repeat):
        for result in results:
            if attempt(result, args.device, functools.partial(take_turn, result, passes, args)) is None:
                del passes[result.name]
                result.seconds, result.host_seconds = {}, {}
    for result in results:
        late = [w for w, host in result.host_seconds.items() if statistics.median(host) > HEAD_START / 2]
        if late:
            waits = f"the host is slow or waits for the GPU, which is in the time ({', '.join(late)})"
            result.note = "; ".join(filter(None, [result.note, waits]))
    return results


def attempt(result: Result, device: torch.device, act: Callable[[], T]) -> T | None:
    """What `act` returns. None if it fails: then the result has the reason, and its memory is free."""
    try:
        return act()
    except Absent as e:
        result.note = str(e)
        return None
    except Exception as e:  # a peer that cannot do this: it is reported, and the others go on
        result.note = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:160]
    release(result, device)
    return None


def release(result: Result, device: torch.device) -> None:
    """Gives back what nobody holds any more. BrokenDevice, with the result, if the GPU is beyond that."""
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as e:
        result.note = result.note or f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"[:160]
        raise BrokenDevice(result) from e


def warm_up(
    contender: Contender, problem: Problem, expected: Exact | None, result: Result, args: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """The passes to time, each run once; all but the times in the result."""
    way = contender.build()
    backward = way.backward and not args.no_backward
    result.executed, result.implementation, result.note = way.executed, way.implementation, way.remark
    result.split = way.split or not backward
    passes = make_passes(way, problem.tensors, backward)
    for run in passes.values():
        run()
    if expected is not None and not contender.bound:
        result.error, result.gradient_error = errors(way, problem.tensors, expected, backward)
    result.memory_mib = peak_mib(list(passes.values())[-1], args.device)
    if args.device.type == "cuda":
        torch.cuda.synchronize()  # so that a fault of its kernels is its own
    return passes


def take_turn(result: Result, passes: dict[str, dict[str, Callable[[], Any]]], args: argparse.Namespace) -> bool:
    for which, run in passes.get(result.name, {}).items():
        seconds, host = timed(run, args)
        result.seconds.setdefault(which, []).append(seconds)
        if host is not None:
            result.host_seconds.setdefault(which, []).append(host)
    return True


def errors(way: Way, tensors: list[Tensor], expected: Exact, backward: bool) -> tuple[float, float | None]:
    """Of the output, and the worst of the gradients."""
    with way.within():
        out = way.run()
        got = [out.detach()]
        if backward:
            given = torch.ones_like(out) if expected.gradient is None else expected.gradient.to(out.dtype)
            got += torch.autograd.grad(out, tensors, given)
    found = [
        ((part(x).double() - exact).abs().max() / exact.abs().max()).item()
        for x, (exact, part) in zip(got, expected.results)
    ]
    return found[0], max(found[1:]) if backward else None


def make_passes(way: Way, tensors: list[Tensor], backward: bool) -> dict[str, Callable[[], Any]]:
    """The forward, as training does it if there is a backward; and both together."""

    def forward() -> Any:
        with torch.set_grad_enabled(backward), way.within():
            return way.run()

    if not backward:
        return {"forward": forward}
    shape = forward()
    # A loss gets the gradient 1, as in training: some have a short way for that.
    gradient = torch.randn_like(shape) if shape.dim() else torch.ones_like(shape)

    def both() -> Any:
        with way.within():
            return torch.autograd.grad(way.run(), tensors, gradient, allow_unused=True)

    return {"forward": forward, "both": both}


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run, dynamic=False)


# ---- the problems ----------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Operations and sizes, in the order of their measurement."""
    shape = {"heads": args.heads, "batch": args.batch}
    found: list[tuple[str, dict[str, Any]]] = []
    for case, d, s in product(cases(args), args.head_dim, args.seq_len):
        found.append(("attention", {"s": s, "d": d, **shape, **case}))
    for case, d, s in product(cases(args), args.head_dim, args.seq_len):
        if case["form"] == "causal":
            rest = {"norm": case["norm"], "alibi_bias_max": case["alibi_bias_max"]}
            found.append(("decode_attention", {"keys": s, "d": d, **shape, **rest}))
    for tokens in args.seq_len:
        sizes = {"tokens": tokens, "d": args.d_model}
        found += [("layer_norm", sizes), ("mlp", sizes)]
        found.append(("linear_cross_entropy", {**sizes, "vocabulary": args.vocab_size}))
    return [(op, sizes) for op, sizes in found if op in args.op]


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Attention's forms, norms and alibi_bias_max: as asked, in every combination; else one at a time."""
    asked = {name: values for name in USUAL if (values := getattr(args, name))}
    if asked:
        every = [asked.get(name, [usual]) for name, usual in USUAL.items()]
        return [dict(zip(USUAL, values)) for values in product(*every)]
    return [USUAL, *(USUAL | {name: value} for name, values in UNUSUAL.items() for value in values)]


def leaf(args: argparse.Namespace, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=args.device) * scale).to(DTYPES[args.dtype]).requires_grad_()


def check_memory(gib: float, args: argparse.Namespace) -> None:
    if gib > args.memory_gib:
        raise Absent(f"its scores take {gib:.3g} GiB, and --memory-gib is {args.memory_gib:g}")


def liger(name: str) -> Any:
    """A function of Liger's."""
    if not torch.cuda.is_available():
        raise Absent("needs a GPU")
    if not importlib.util.find_spec("liger_kernel"):
        raise Absent("not installed")
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def attention(
    args: argparse.Namespace, s: int, d: int, heads: int, batch: int, form: str, norm: float, alibi_bias_max: float
) -> Problem:
    """q, k of the given scale * |q| * |k|, as normal vectors; documents of S / 8 on average, or a quarter padded."""
    b, h, device = batch, heads, args.device
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

    def ours(skip: bool) -> Way:
        with torch.no_grad():
            kept = float(kernels.flash_attention(q, k, v, skip=skip, return_kept=True, **given)[1])
        which = choose("flash_attention", q, unfit="too wide" if d > 256 else None)
        return Way(lambda: kernels.flash_attention(q, k, v, skip=skip, **given), kept, implementation=which)

    contenders = [
        Contender("ours", lambda: ours(True)),
        Contender("ours, no skipping", lambda: ours(False)),
        *with_a_bias(q, k, v, slopes, masks, args),
        *without_a_bias(q, k, v, form),
        *([] if args.no_compile else flex(q, k, v, slopes, masks)),
    ]

    def exact() -> Exact:
        """Row by row: each has float64 copies of k and v to itself until its backward is done."""
        rows = torch.linspace(0, s - 1, min(s, 16)).long().tolist()
        q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
        seen = masks.get("attention_mask", torch.ones(b, s, dtype=torch.bool, device=device))[:, rows, None, None]
        gradient = torch.zeros_like(v)
        gradient[:, rows] = torch.randn_like(v[:, rows]) * seen
        attend: Any = reference.flash_attention
        parts = []
        for i, r in enumerate(rows):
            part = attend(q64[:, r : r + 1], k64, v64, query_offset=r, **given) * seen[:, i : i + 1]
            part.backward(gradient[:, r : r + 1].double())
            parts.append(part.detach())
        whole = [(x.grad, lambda grad: grad) for x in (q64, k64, v64) if x.grad is not None]
        return Exact(gradient, [(torch.cat(parts, 1), lambda out: out[:, rows] * seen), *whole])

    forward = 2 * b * h * s * s * d  # two products over the causal half
    return Problem([q, k, v], contenders, exact, flops=(forward, 2.5 * forward))


def visible(s: int, masks: dict[str, Tensor], device: torch.device) -> Tensor:
    """(B or 1, S, S) bool."""
    see = torch.ones(s, s, dtype=torch.bool, device=device).tril()[None]
    if "sequence_id" in masks:
        ids = masks["sequence_id"]
        see = see & (ids[:, :, None] == ids[:, None, :])
    if "attention_mask" in masks:
        see = see & masks["attention_mask"][:, None, :]
    return see


def with_a_bias(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, masks: dict[str, Tensor], args: argparse.Namespace
) -> list[Contender]:
    """What takes ALiBi and the masks as one (B or 1, H, S, S) tensor, made beforehand and once for all of them."""
    b, s, h, d = q.shape

    @functools.cache
    def bias() -> Tensor:
        check_memory(b * h * s * s * max(4, q.element_size()) / 2**30, args)
        see = visible(s, masks, q.device)
        position = torch.arange(s, device=q.device)
        away = (position[:, None] - position).float()
        made = torch.empty(len(see), h, s, s, dtype=q.dtype, device=q.device)
        for i in range(h):  # one at a time: in fp32 all of them would take three times the result
            made[:, i] = (-slopes[i] * away).masked_fill(~see, float("-inf"))
        return made

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        scores = qt @ kt.transpose(2, 3) * d**-0.5 + bias
        return (scores.float().softmax(-1).to(vt.dtype) @ vt).transpose(1, 2)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(qt, kt, vt, attn_mask=bias).transpose(1, 2)

    def way(run: Callable[..., Tensor], compile: bool = False) -> Way:
        made = bias()
        run = compiled(run) if compile else run
        beside = f"beside it the bias, {made.nbytes / 2**20:.0f} MiB"
        return Way(lambda: run(q, k, v, made), executed=2.0, remark=beside)

    return [
        Contender("eager, as transformers", lambda: way(eager)),
        *([] if args.no_compile else [Contender("torch.compile", lambda: way(eager, compile=True))]),
        Contender("SDPA with a bias", lambda: way(sdpa)),
    ]


def without_a_bias(q: Tensor, k: Tensor, v: Tensor, form: str) -> list[Contender]:
    """Causal attention without ALiBi: no contender, but what libraries reach."""

    def forced(backend: SDPBackend) -> Way:
        if form != "causal":
            raise Absent("it takes no masks")
        if backend == SDPBackend.CUDNN_ATTENTION and q.device.type != "cuda":
            raise Absent("needs a GPU")

        def run() -> Tensor:
            qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(qt, kt, vt, is_causal=True).transpose(1, 2)

        return Way(run)

    return [
        Contender("SDPA flash, no ALiBi", lambda: forced(SDPBackend.FLASH_ATTENTION), bound=True),
        Contender("SDPA cuDNN, no ALiBi", lambda: forced(SDPBackend.CUDNN_ATTENTION), bound=True),
    ]


def flex(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, masks: dict[str, Tensor]) -> list[Contender]:
    """FlexAttention; with the blocks that are visible, and with those of them that our bound keeps.

    On a CPU it has no backward, and its inputs may not ask for one.
    """
    b, s, h, d = q.shape
    on_gpu = q.device.type == "cuda"
    ids, valid = masks.get("sequence_id"), masks.get("attention_mask")

    def score(scores: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return scores - slopes[head] * (i - j)

    def mask(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        see = i >= j
        if ids is not None:
            see = see & (ids[batch, i] == ids[batch, j])
        if valid is not None:
            see = see & valid[batch, j]
        return see

    @functools.cache
    def attend() -> Callable[..., Any]:
        return compiled(flex_attention)

    def way(ours: bool) -> Way:
        if s % FLEX_BLOCK:
            raise Absent(f"its blocks are made here for multiples of {FLEX_BLOCK} only")
        some, every = visible_blocks(s, masks, q.device)
        if ours:
            scaled, keys = (x.detach().permute(2, 0, 1, 3).reshape(h * b, s, d) for x in (q * d**-0.5, k))
            folded = slopes.repeat_interleave(b)[:, None]
            rules = Rules(True, None, 0, valid, ids, None)
            starts = first_kept(scaled[:, None], keys, folded, rules, chunk=FLEX_BLOCK, bits=24)
            first = starts.view(h, b, -1).transpose(0, 1) // FLEX_BLOCK
            some = some & (torch.arange(s // FLEX_BLOCK, device=q.device) >= first[..., None])
        blocks, causal = block_mask(some, every, mask), (s // FLEX_BLOCK) * (s // FLEX_BLOCK + 1) / 2
        run = attend()

        def forward() -> Tensor:
            inputs = (x.transpose(1, 2) if on_gpu else x.detach().transpose(1, 2) for x in (q, k, v))
            return run(*inputs, score_mod=score, block_mask=blocks).transpose(1, 2)

        share = float(some.float().mean()) * some[0, 0].numel() / causal
        return Way(forward, share, backward=on_gpu, remark="" if on_gpu else "no backward on a CPU")

    return [
        Contender("FlexAttention", lambda: way(ours=False)),
        Contender("FlexAttention, our blocks", lambda: way(ours=True)),
    ]


def visible_blocks(s: int, masks: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the blocks of queries and keys, those with a visible pair, and those of visible pairs alone: bool (B or 1, 1,
    S / 128, S / 128). As create_block_mask finds them, without a look at every pair.
    """
    block = torch.arange(s // FLEX_BLOCK, device=device)
    some, every = (block[:, None] >= block)[None], (block[:, None] > block)[None]
    if "sequence_id" in masks:  # which do not decrease
        ids = masks["sequence_id"]
        first, last = ids[:, ::FLEX_BLOCK], ids[:, FLEX_BLOCK - 1 :: FLEX_BLOCK]
        some = some & (last[:, None, :] >= first[:, :, None])
        every = every & (first[:, None, :] == last[:, :, None])
    if "attention_mask" in masks:
        valid = masks["attention_mask"].unflatten(1, (-1, FLEX_BLOCK))
        some, every = some & valid.any(-1)[:, None], every & valid.all(-1)[:, None]
    return some[:, None], every[:, None]


def block_mask(some: Tensor, every: Tensor, mask: Callable[..., Tensor]) -> BlockMask:
    """some (B, H, T, T) bool: the blocks to compute; every: those that need no mask, whether to be computed or not."""

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()

    return BlockMask.from_kv_blocks(*listed(some & ~every), *listed(some & every), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask)


def decode_attention(
    args: argparse.Namespace, keys: int, d: int, heads: int, batch: int, norm: float, alibi_bias_max: float
) -> Problem:
    """The newest query of each row on a full cache. GB/s: of the cache, read once."""
    b, h, device, dtype = batch, heads, args.device, DTYPES[args.dtype]
    drawn = (norm / d**0.5) ** 0.5
    q = (torch.randn(b, 1, h, d, device=device) * drawn).to(dtype)
    k, v = ((torch.randn(b, h, keys, d, device=device) * size).to(dtype) for size in (drawn, 1.0))
    slopes = kernels.alibi_slopes(h, alibi_bias_max).to(device)
    lengths = torch.full((b,), keys, device=device)
    bias = (slopes[:, None, None] * torch.arange(1 - keys, 1, device=device)).to(dtype)

    def ours(skip: bool) -> Way:
        norms, kept = None, 1.0
        if skip:
            norms = torch.zeros(b, h, -(-keys // GRAIN), device=device)
            kernels.update_key_norms(norms, k, 0)
        given: dict[str, Any] = {"alibi_slopes": slopes, "key_norms": norms}
        if skip:
            kept = float(kernels.decode_attention(q, k, v, lengths, **given, return_kept=True)[1])
        run = functools.partial(kernels.decode_attention, q, k, v, lengths, **given)
        return Way(run, kept, backward=False, implementation=choose("decode_attention", q))

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.transpose(1, 2) @ k.transpose(2, 3) * d**-0.5 + bias
        return (scores.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bias).transpose(1, 2)

    def score(scores: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return scores - slopes[head] * (keys - 1 - j)

    def flexible() -> Way:
        attend: Any = compiled(flex_attention)
        return Way(lambda: attend(q.transpose(1, 2), k, v, score_mod=score).transpose(1, 2), backward=False)

    def way(run: Callable[..., Tensor]) -> Way:
        return Way(lambda: run(q, k, v), backward=False)

    contenders = [Contender("ours", lambda: ours(True)), Contender("ours, no skipping", lambda: ours(False))]
    contenders.append(Contender("eager, as transformers", lambda: way(eager)))
    contenders.append(Contender("SDPA with a bias", lambda: way(sdpa)))
    if not args.no_compile:
        contenders.append(Contender("torch.compile", lambda: way(compiled(eager))))
        contenders.append(Contender("FlexAttention", flexible))

    def exact() -> Exact:
        attend: Any = reference.decode_attention
        expected = attend(q.double(), k.double(), v.double(), lengths, alibi_slopes=slopes)
        return Exact(None, [(expected, lambda out: out)])

    return Problem([], contenders, exact, moved=(float(k.nbytes + v.nbytes), 0.0))


def layer_norm(args: argparse.Namespace, tokens: int, d: int) -> Problem:
    x, weight, bias = leaf(args, tokens, d), leaf(args, d), leaf(args, d)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (d,), weight, bias)

    def ours() -> Way:
        return Way(lambda: kernels.layer_norm(x, weight, bias), implementation=choose("layer_norm", x))

    def ligers() -> Way:
        norm = liger("liger_layer_norm")
        return Way(lambda: norm(x, weight, bias, 1e-5))

    def way(run: Callable[..., Tensor]) -> Way:
        return Way(lambda: run(x, weight, bias))

    contenders = [Contender("ours", ours), Contender("torch", lambda: way(plain))]
    if not args.no_compile:
        contenders.append(Contender("torch.compile", lambda: way(compiled(plain))))
    contenders.append(Contender("Liger", ligers))

    def exact() -> Exact:
        return exact_at_first_rows(reference.layer_norm, [x, weight, bias], 256)

    moved = (2.0 * x.nbytes, 3.0 * x.nbytes)  # forward x, y; backward x, dy, dx
    return Problem([x, weight, bias], contenders, exact, moved=moved)


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


def mlp(args: argparse.Namespace, tokens: int, d: int) -> Problem:
    """Ours in the form that its table chooses, and in each form by itself: the times of forward and backward say what
    the table is to choose.
    """
    x, up, down = leaf(args, tokens, d), leaf(args, 4 * d, d, scale=d**-0.5), leaf(args, d, 4 * d, scale=d**-0.5)

    def plain(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.gelu(x @ up.T) @ down.T

    def ours(within: Callable[[], AbstractContextManager[Any]] = nullcontext, *, triton: bool = False) -> Way:
        which = choose("mlp", x)
        if triton and which != "triton":
            raise Absent(f"a form of the Triton kernels; {which} runs here")
        return Way(lambda: kernels.mlp(x, up, down), within=within, implementation=which)

    def way(run: Callable[..., Tensor]) -> Way:
        return Way(lambda: run(x, up, down))

    contenders = [Contender("ours", ours)]
    contenders.append(Contender("ours, fused", lambda: ours(lambda: only("fused"), triton=True)))
    contenders.append(Contender("ours, pointwise", lambda: ours(lambda: only("pointwise"), triton=True)))
    contenders.append(Contender("torch", lambda: way(plain)))
    if not args.no_compile:
        contenders.append(Contender("torch.compile", lambda: way(compiled(plain))))

    def exact() -> Exact:
        return exact_at_first_rows(reference.mlp, [x, up, down], 64)

    flops = (16.0 * tokens * d * d, 32.0 * tokens * d * d)
    return Problem([x, up, down], contenders, exact, flops=flops)


def linear_cross_entropy(args: argparse.Namespace, tokens: int, d: int, vocabulary: int) -> Problem:
    hidden, weight = leaf(args, tokens, d), leaf(args, vocabulary, d, scale=d**-0.5)
    labels = torch.randint(vocabulary, (tokens,), device=args.device)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels)

    def ours() -> Way:
        which = choose("linear_cross_entropy", hidden)
        run = functools.partial(kernels.linear_cross_entropy, hidden, weight, labels)
        return Way(run, split=which == "reference", implementation=which)

    def ligers() -> Way:
        loss = liger("liger_fused_linear_cross_entropy")
        return Way(lambda: loss(hidden, weight, labels), split=False)

    def way(compile: bool) -> Way:
        check_memory(3 * tokens * vocabulary * 4 / 2**30, args)
        run = compiled(plain) if compile else plain
        return Way(lambda: run(hidden, weight))

    contenders = [Contender("ours", ours), Contender("torch", lambda: way(compile=False))]
    if not args.no_compile:
        contenders.append(Contender("torch.compile", lambda: way(compile=True)))
    contenders.append(Contender("Liger", ligers))

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
    return Problem([hidden, weight], contenders, exact, flops=flops)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "attention": attention,
    "decode_attention": decode_attention,
    "layer_norm": layer_norm,
    "mlp": mlp,
    "linear_cross_entropy": linear_cross_entropy,
}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the end of a slice: plots are still written
    sys.exit(main())
