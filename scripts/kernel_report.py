"""What every shipped Triton kernel uses, compiled ahead of time for several GPUs without one.

For each kernel and tile: registers, spills, shared memory against the limit, the kind of matrix instruction, and the
instructions per score element in attention's inner loop, as a Markdown table. A run of everything also saves it, with a
JSON file, under the name of the installed Triton, whose compiler decides most of it; of the machine nothing matters.
Exits with 1 where a kernel spills in an inner loop that is promised to be free of that, and with --check where any
limit is broken.
Example: python scripts/kernel_report.py --arch sm_90 --op flash_attention --check
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).parent.parent))

from kernels.compile import MODULES, SHARED_LIMIT, Result, Variant, as_markdown, compile_all, shipped

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def main(argv: Sequence[str] | None = None, modules: Sequence[str] = MODULES) -> int:
    args = parse_args(argv)
    jobs: list[tuple[str, Variant]] = []
    missing: dict[str, None] = {}  # in order, once each
    for architecture in args.arch:
        variants, without = shipped(architecture, modules)
        jobs += [(architecture, variant) for variant in variants]
        missing |= dict.fromkeys(without)
    for line in missing:
        print(line, file=sys.stderr)
    operations = list(dict.fromkeys(variant.op for _, variant in jobs))
    if args.op and args.op not in operations:
        print(f"--op is {args.op!r}; there are kernels of: {', '.join(operations) or 'nothing'}", file=sys.stderr)
        return 2
    if not jobs:
        print("nothing to compile", file=sys.stderr)
        return 1
    jobs = [job for job in jobs if args.op in (None, job[1].op)]
    results = compile_all(jobs, args.workers, done=Progress(len(jobs)))
    text = heading(results, list(missing)) + as_markdown(results)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"triton-{triton.__version__}"
        rows = [r.as_dict() for r in results]
        about = {"triton": triton.__version__, "not_compiled": list(missing), "results": rows}
        (args.out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(text)
        print(f"written: {args.out / name}.json, .md", file=sys.stderr)
    broken = [f"{r.architecture} {r.op} {r.label}: {p}" for r in results for p in r.problems()]
    for line in broken:
        print(line, file=sys.stderr)
    promises = any(r.no_spill and r.problems() for r in results)
    return 1 if promises or (args.check and (broken or (missing and not args.op))) else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=list(SHARED_LIMIT), help=f"(default: {' '.join(ARCHITECTURES)})")
    parser.add_argument("--op", help="one operation only (default: all)")
    parser.add_argument(
        "--out", type=Path, help="folder for the files (default: benchmarks/kernel-report for a run of everything)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="compilations at a time (default: CPUs)")
    parser.add_argument("--check", action="store_true", help="exit 1 if a limit is broken or a file lists no kernels")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}; give 1 or more")
    if not (args.arch or args.op or args.out):
        args.out = ROOT / "benchmarks" / "kernel-report"
    args.arch = args.arch or list(ARCHITECTURES)
    return args


class Progress:
    """A line on standard error for each compiled variant."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, result: Result) -> None:
        self.done += 1
        said = f"{result.architecture} {result.op} {result.label}: {result.seconds:.1f} s"
        print(f"[{self.done}/{self.total}] {said}", file=sys.stderr, flush=True)


def heading(results: Sequence[Result], missing: Sequence[str]) -> str:
    broken = sum(bool(r.problems()) for r in results)
    said = f"{len(results)} variants, {broken} of which break a limit. No GPU was used: there are no times here."
    return "\n\n".join([f"# Kernels compiled by Triton {triton.__version__}", said, *missing, ""])


if __name__ == "__main__":
    sys.exit(main())
