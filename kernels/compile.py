"""Ahead-of-time compilation of the Triton kernels, without a GPU, and the report of what they use.

Nothing on a GPU refuses a tile that spills or misses the matrix units: it is only slow. What decides that is known once
a kernel is compiled, for whatever GPU. `scripts/kernel_report.py` is the command.
"""

import contextlib
import importlib
import importlib.util
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import IO, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from kernels import assembly
from kernels.assembly import Loop

# Each file of kernels that has Triton kernels, by its module's name; `variants(architecture)` lists what it ships.
MODULES = (
    "kernels.flash_attention",
    "kernels.decode_attention",
    "kernels.layer_norm",
    "kernels.mlp",
    "kernels.linear_cross_entropy",
    "kernels.lion",
)

# Bytes of shared memory that one program may use. NVIDIA: "maximum amount of shared memory per thread block" in the
# CUDA programming guide's table of compute capabilities. AMD: the LDS of a compute unit in ROCm's table of GPUs.
KIB = 1024
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "gfx90a": 64 * KIB,
    "gfx942": 64 * KIB,
}
TENSOR_MEMORY_LIMIT = 512  # columns, sm_100
SPILL_LIMIT = 64  # bytes per thread, where a variant is not `no_spill`


@dataclass(frozen=True)
class Variant:
    """A kernel as it is shipped for one architecture: with one dtype, one tile, one set of options.

    Each file of kernels has `variants(architecture)`, which lists its own. op: of kernels' public functions. label: the
    kernel and its tile in words. kernel: the @triton.jit function. signature: Triton's type of each argument that is
    no constexpr ("*bf16", "i32", "fp32", "tensordesc<bf16[1,1,64,128]>"). constants: values of the constexprs (and of
    what the JIT makes one: an argument that is None, a stride of 1). divisible: names of the arguments known to be
    multiples of 16 (pointers, strides): the JIT specialises on that, unless the kernel forbids it. scores: score
    elements per iteration of the inner loop of the whole program (BLOCK_M * BLOCK_N), for kernels that have one.
    options: of the launch, beside num_warps and num_stages. no_spill: spills in the inner loop are an error.
    """

    op: str
    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    scores: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    no_spill: bool = False


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses. None: this architecture or kernel has no such thing.

    registers: of a thread, AMD's accumulation registers among them. scalar_registers: AMD's, of a wave. spill_bytes:
    that a thread stores to its own memory (local on NVIDIA, scratch on AMD). shared: bytes of a program. tensor_memory:
    columns. matrix: how many matrix instructions of each kind. loop_instructions: of one iteration of the inner loop.
    per_score: instructions for one score element in it. local_in_loop: its loads and stores of spilled registers.
    local_in_other_loops: the most of those in another innermost loop (masked tiles). warnings: ptxas's.
    """

    registers: int
    accumulation_registers: int | None
    scalar_registers: int | None
    spill_bytes: int
    shared: int
    shared_limit: int
    tensor_memory: int | None
    matrix: dict[str, int]
    loop_instructions: int | None
    per_score: float | None
    local_in_loop: int | None
    local_in_other_loops: int
    warnings: list[str]


@dataclass(frozen=True)
class Result:
    """One variant, compiled for one architecture; resources is None where it failed, and error says why."""

    op: str
    label: str
    architecture: str
    num_warps: int
    num_stages: int
    no_spill: bool
    resources: Resources | None
    error: str | None
    seconds: float

    def problems(self) -> list[str]:
        """The hard limits that it breaks."""
        r = self.resources
        if r is None:
            return [f"does not compile: {self.error}"]
        out = []
        if r.shared > r.shared_limit:
            out.append(f"{r.shared} bytes of shared memory, over the limit of {r.shared_limit}")
        if (r.tensor_memory or 0) > TENSOR_MEMORY_LIMIT:
            out.append(f"{r.tensor_memory} columns of tensor memory, over the limit of {TENSOR_MEMORY_LIMIT}")
        if not self.no_spill and r.spill_bytes > SPILL_LIMIT:
            out.append(f"{r.spill_bytes} bytes of spills, over the limit of {SPILL_LIMIT}")
        if self.no_spill and r.local_in_loop:
            out.append(f"{r.local_in_loop} loads and stores of spilled registers in the inner loop")
        if self.no_spill and r.local_in_loop is None and r.spill_bytes:
            out.append(f"{r.spill_bytes} bytes of spills, and no loop was found to tell where")
        return out

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"problems": self.problems()}


# ---- what is shipped
# --------------------------------------------------------------------------------------------------


def shipped(architecture: str, modules: Sequence[str] = MODULES) -> tuple[list[Variant], list[str]]:
    """The variants for an architecture, and a line for each module that lists none.

    ValueError for an architecture without a table. RuntimeError under TRITON_INTERPRET, where kernels are Python
    functions that cannot be compiled: leave that out of the environment.
    """
    if architecture not in SHARED_LIMIT:
        raise ValueError(f"architecture is {architecture!r}; it must be one of {', '.join(SHARED_LIMIT)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so this process only interprets kernels; unset it to compile them")
    variants: list[Variant] = []
    missing = []
    for name in modules:
        listed = getattr(importlib.import_module(name), "variants", None) if importlib.util.find_spec(name) else None
        if listed is None:
            missing.append(f"{name} has no variants(architecture): none of it is compiled")
        else:
            found = listed(architecture)
            if not found:
                missing.append(f"{name} lists no variant for {architecture}: none of it is compiled")
            variants += found
    return variants, missing


# ---- one variant
# ------------------------------------------------------------------------------------------------------


def compile_variant(variant: Variant, architecture: str) -> Resources:
    """Compile and measure, in this process. ValueError if the variant does not fit its kernel."""
    target = _target(architecture)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    known = make_backend(target).parse_options(dict(options)).__dict__
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{variant.label}: options {unknown} mean nothing on {architecture}")
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(log), contextlib.ExitStack() as knobs:
        # a private cache, and no hits in it: the log exists only where ptxas runs
        for group, name, value in (
            (triton.knobs.cache, "dir", cache),
            (triton.knobs.compilation, "always_compile", True),
            (triton.knobs.nvidia, "dump_ptxas_log", True),
        ):
            knobs.enter_context(_set(group, name, value))
        compiled = triton.compile(_source(variant, architecture), target=target, options=options)
    if target.backend == "cuda":
        return _nvidia(variant, architecture, compiled, log.getvalue())
    return _amd(variant, architecture, compiled)


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@contextlib.contextmanager
def _set(group: Any, name: str, value: Any) -> Any:
    with group.scope():
        setattr(group, name, value)
        yield


def _source(variant: Variant, architecture: str) -> ASTSource:
    """The kernel with its types and specialisations, as the JIT would infer them at a launch."""
    if not isinstance(variant.kernel, triton.JITFunction):
        raise ValueError(f"{variant.label}: kernel is {type(variant.kernel).__name__}; pass the @triton.jit function")
    names = variant.kernel.arg_names
    given = [*variant.signature, *variant.constants]
    wrong = sorted(set(names) ^ set(given)) + sorted(set(variant.signature) & set(variant.constants))
    same = {parameter.name for parameter in variant.kernel.params if parameter.do_not_specialize}
    wrong += sorted(set(variant.divisible) - (set(variant.signature) - same))
    if wrong:
        raise ValueError(f"{variant.label}: arguments {wrong} are unknown, given twice or missing; it takes {names}")
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(names):
        if name in variant.divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
            if architecture.startswith("gfx") and variant.signature[name].startswith("*"):
                attributes[(i,)].append(["tt.pointer_range", 32])  # the JIT's choice for tensors below 2 GiB
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    return ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes)


def _nvidia(variant: Variant, architecture: str, compiled: Any, log: str) -> Resources:
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spills is None:
        raise RuntimeError(f"{variant.label}: ptxas's log has no registers or spills: {log[:500]!r}")
    listing = assembly.read_sass(_disassembled(compiled.asm["cubin"]))
    return Resources(
        registers=int(registers[1]),
        accumulation_registers=None,
        scalar_registers=None,
        spill_bytes=int(spills[1]),
        shared=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[architecture],
        tensor_memory=compiled.metadata.tmem_size or None,
        matrix=assembly.matrix_kinds(listing),
        **_in_loops(variant, assembly.loops(listing), variant.num_warps * 32),
        warnings=_warnings(log),
    )


def _warnings(log: str) -> list[str]:
    """What ptxas has to say beside the figures: above all that wgmma runs serialized, which it calls an info."""
    told = (line.split(":", 1)[-1].strip() for line in log.splitlines() if re.search("warning|Performance Loss", line))
    return sorted(set(told))


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _amd(variant: Variant, architecture: str, compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    counts = {name: int(n) for name, n in re.findall(r"^\s*-?\s*\.(\w+_count):\s+(\d+)", text, re.M)}
    listing = assembly.read_amdgcn(text)
    return Resources(
        registers=counts["vgpr_count"],
        accumulation_registers=counts["agpr_count"],
        scalar_registers=counts["sgpr_count"],
        spill_bytes=4 * counts["vgpr_spill_count"],
        shared=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[architecture],
        tensor_memory=None,
        matrix=assembly.matrix_kinds(listing),
        **_in_loops(variant, assembly.loops(listing), variant.num_warps * 64),
        warnings=[],
    )


def _in_loops(variant: Variant, loops: Sequence[Loop], threads: int) -> dict[str, Any]:
    """The part of Resources that is about loops."""
    per_thread = variant.scores / threads if variant.scores else None
    inner = inner_loop(loops, per_thread)
    others = [loop.local for loop in loops if loop.innermost and loop is not inner]
    per_score = None
    if inner and per_thread:
        # An unrolled loop has several iterations' exponentials. Where a thread has few scores, those of its rows, one
        # an iteration, and copies of scores that threads share cannot be told from that.
        unrolled = max(1, int(inner.exp2 // per_thread)) if per_thread >= 8 else 1
        per_score = round(inner.instructions / (per_thread * unrolled), 2)
    return {
        "loop_instructions": inner.instructions if inner else None,
        "per_score": per_score,
        "local_in_loop": inner.local if inner else None,
        "local_in_other_loops": max(others, default=0),
    }


def inner_loop(loops: Sequence[Loop], scores_per_thread: float | None) -> Loop | None:
    """The loop in which a kernel spends its time.

    With scores, where one has at least an exponential for each and matrix instructions (if any loop has those): the
    smallest such, which is attention's loop over tiles that need no mask. Else, of the innermost ones, that with the
    most matrix instructions, then the largest.
    """
    candidates = [loop for loop in loops if loop.matrix] or list(loops)
    if scores_per_thread:
        with_all = [loop for loop in candidates if loop.exp2 >= scores_per_thread]
        if with_all:
            return min(with_all, key=lambda loop: loop.instructions)
    innermost = [loop for loop in candidates if loop.innermost]
    return max(innermost, key=lambda loop: (loop.matrix, loop.instructions), default=None)


# ---- many variants
# ----------------------------------------------------------------------------------------------------


def compile_all(
    jobs: Sequence[tuple[str, Variant]],
    workers: int = 1,
    timeout_s: float = 600.0,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Compile each (architecture, variant), `workers` at a time; the results come in the order of the jobs.

    Each has a process of its own, forked from this one, as some errors in LLVM or MLIR end the process.
    """
    context = multiprocessing.get_context("fork")
    waiting = deque(enumerate(jobs))
    running: dict[Connection, _Running] = {}
    results: dict[int, Result] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, (architecture, variant) = waiting.popleft()
                receiving, sending = context.Pipe(duplex=False)
                errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
                process = context.Process(target=_child, args=(variant, architecture, sending, errors))
                process.start()
                sending.close()
                running[receiving] = _Running(index, process, errors, time.monotonic())
            ended = set(wait(list(running), timeout=1.0))
            for connection, child in list(running.items()):
                late = time.monotonic() - child.started > timeout_s
                if connection in ended or late:
                    del running[connection]
                    result = _result(jobs[child.index], child, connection if connection in ended else None)
                    results[child.index] = result
                    done(result)
    finally:
        for child in running.values():
            child.process.kill()
    return [results[index] for index in range(len(jobs))]


@dataclass(frozen=True)
class _Running:
    index: int
    process: BaseProcess
    errors: IO[str]  # what it wrote to standard error
    started: float


def _child(variant: Variant, architecture: str, connection: Connection, errors: IO[str]) -> None:
    os.dup2(errors.fileno(), 2)
    try:
        connection.send(compile_variant(variant, architecture))
    except Exception as e:
        connection.send(f"{type(e).__name__}: {e}")


def _result(job: tuple[str, Variant], child: _Running, connection: Connection | None) -> Result:
    """connection: None if its time was up."""
    architecture, variant = job
    seconds = time.monotonic() - child.started
    sent: Resources | str
    if connection is None:
        child.process.kill()
        sent = f"not done after {seconds:.0f} s"
    else:
        try:
            sent = connection.recv()
        except EOFError:
            child.process.join()
            sent = f"the compiler ended with exit code {child.process.exitcode}"
    child.process.join()
    child.errors.seek(0)
    said = [line.strip() for line in child.errors if "error" in line.lower()]
    child.errors.close()
    return Result(
        op=variant.op,
        label=variant.label,
        architecture=architecture,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        no_spill=variant.no_spill,
        resources=sent if isinstance(sent, Resources) else None,
        error="; ".join([sent, *said[:3]])[:2000] if isinstance(sent, str) else None,
        seconds=round(seconds, 1),
    )


# ---- the report
# -------------------------------------------------------------------------------------------------------


def as_markdown(results: Sequence[Result]) -> str:
    """A table for each architecture; what breaks a limit is in bold."""
    out = []
    for architecture in dict.fromkeys(r.architecture for r in results):
        limit = SHARED_LIMIT[architecture] // KIB
        heads = ["operation", "kernel", "warps", "stages", "registers", "spilled, bytes", f"shared, KiB of {limit}"]
        heads += ["matrix instructions", "inner loop", "per score", "spills in loop", "remarks"]
        out += [f"## {architecture}\n", _row(heads), _row(["---"] * len(heads))]
        out += [_row(_cells(r)) for r in results if r.architecture == architecture]
        out.append("")
    return "\n".join(out)


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(c) for c in cells)} |"


def _cells(result: Result) -> list[str]:
    def shown(value: Any) -> str:
        return "" if value is None else str(value)

    problems = [f"**{' '.join(p.replace('|', ' ').split())[:300]}**" for p in result.problems()]
    first = [result.op, result.label, str(result.num_warps), str(result.num_stages)]
    r = result.resources
    if r is None:
        return [*first, *[""] * 7, *problems]
    registers = f"{r.registers} ({r.accumulation_registers} acc)" if r.accumulation_registers else str(r.registers)
    local = shown(r.local_in_loop) + (f" (+{r.local_in_other_loops})" if r.local_in_other_loops else "")
    remarks = [*problems, *r.warnings] + ([f"{r.tensor_memory} tensor memory columns"] if r.tensor_memory else [])
    return [
        *first,
        registers,
        str(r.spill_bytes),
        f"{r.shared / KIB:.1f}",
        ", ".join(f"{n} {kind}" for kind, n in r.matrix.items()),
        shown(r.loop_instructions),
        shown(r.per_score),
        local,
        "; ".join(remarks),
    ]
