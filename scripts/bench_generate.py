"""Generation on this CPU, ours against transformers' MPT: tokens per second, time to the first token, peak memory.

Both models have the same weights and prompts and take turns in one process; medians are compared. Greedy, fp32,
transformers with its cache, which MPT's configurations, its default and the published ones, turn off: --their-default
leaves it off. Peak memory is that of a process that runs one model only, less what it was after the imports.
Example: python scripts/bench_generate.py --case batch-4 --repeat 5
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from mpt import MptConfig, MptForCausalLM
from mpt.initialize import init_weights
from scripts.bench_train import peak_gib


@dataclass(frozen=True)
class Case:
    """A shape, and what to reach against transformers: speed of the whole call, and memory where it is asked for."""

    n_layers: int
    batch: int
    prompt: int
    new: int
    speed: float
    memory: float | None = None
    d_model: int = 768
    n_heads: int = 12
    vocab_size: int = 50368


CASES = {
    "batch-1": Case(12, 1, 512, 128, 2.0),
    "batch-4": Case(12, 4, 512, 128, 2.0),
    "first-token": Case(4, 1, 8192, 1, 4.0, 0.3),
}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ("n_layers", "batch", "prompt", "new", "d_model", "n_heads", "vocab_size")
    sizes = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.only:
        print(json.dumps(peak_memory(args.only, replace(CASES[args.case[0]], **sizes))))
        return 0
    results = []
    for name in args.case:
        case = replace(CASES[name], **sizes)
        result = {"case": name, "shape": asdict(case)} | measure(case, args)
        if case.memory is not None and not args.no_memory:
            result["memory"] = {who: memory_of(who, name, sizes, args) for who in ("ours", "theirs")}
        report(result, case)
        results.append(result)
    if args.json:
        about = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "cpu_time": args.cpu_time,
        }
        args.json.write_text(json.dumps(about | {"torch": torch.__version__, "results": results}, indent=2) + "\n")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="shapes (default: all)")
    parser.add_argument("--repeat", type=int, default=5, help="timed calls of each model, after one untimed")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: for a machine that is not idle, with --threads 1"
    )
    parser.add_argument("--their-default", action="store_true", help="transformers as it comes, without its cache")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    for name in ("n-layers", "batch", "prompt", "new", "d-model", "n-heads", "vocab-size"):
        parser.add_argument(f"--{name}", type=int, help="instead of the case's")
    parser.add_argument("--only", choices=["ours", "theirs"], help=argparse.SUPPRESS)  # a process that measures memory
    return parser.parse_args(argv)


def build_ours(case: Case) -> MptForCausalLM:
    shape = {name: getattr(case, name) for name in ("d_model", "n_heads", "n_layers", "vocab_size")}
    with torch.device("meta"):
        model = MptForCausalLM(MptConfig(**shape))
    model = model.to_empty(device="cpu")
    init_weights(model, seed=0)
    return model.eval()


def build_theirs(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    from transformers import MptConfig as TheirConfig
    from transformers import MptForCausalLM as TheirModel

    shape = {name: getattr(case, name) for name in ("d_model", "n_heads", "n_layers", "vocab_size")}
    length = max(case.prompt + case.new, 2048)  # its ALiBi ends there
    model = TheirModel(TheirConfig(**shape, max_seq_len=length))
    model.load_state_dict(weights, strict=False)
    return model.eval()


def generate(model: Any, case: Case, their_default: bool = False) -> Tensor:
    ids = torch.randint(case.vocab_size, (case.batch, case.prompt), generator=torch.Generator().manual_seed(0))
    kwargs: dict[str, Any] = {"max_new_tokens": case.new, "do_sample": False, "pad_token_id": 0}
    if not isinstance(model, MptForCausalLM):
        kwargs |= {"attention_mask": torch.ones_like(ids), "eos_token_id": None}
        kwargs |= {} if their_default else {"use_cache": True}
    return model.generate(ids, **kwargs)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    ours = build_ours(case)
    models: dict[str, nn.Module] = {"ours": ours, "theirs": build_theirs(case, ours.state_dict())}
    clock = time.process_time if args.cpu_time else time.perf_counter
    outputs = {who: generate(model, case, args.their_default) for who, model in models.items()}
    same = (outputs["ours"] == outputs["theirs"])[:, case.prompt :]
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.repeat):
        for who, model in models.items():
            start = clock()
            generate(model, case, args.their_default)
            times[who].append(clock() - start)
    return {"seconds": dict(times), "same_tokens": same.float().mean().item()}


# ---- memory


def memory_of(who: str, case: str, sizes: dict[str, int], args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", who, "--case", case]
    for name, value in (sizes | ({"threads": args.threads} if args.threads else {})).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak_memory(who: str, case: Case) -> dict[str, float]:
    """GiB at the peak of one call in this process, and after the imports."""
    if who == "theirs":
        import transformers.models.mpt.modeling_mpt

        assert transformers.models.mpt.modeling_mpt is not None
    torch.randn(64, 64) @ torch.randn(64, 64)
    imports = peak_gib()
    generate(build_ours(case) if who == "ours" else build_theirs(case, {}), case)
    return {"peak": peak_gib(), "imports": imports}


# ---- the report


def report(result: dict[str, Any], case: Case) -> None:
    median = {who: statistics.median(times) for who, times in result["seconds"].items()}
    shape = f"{case.d_model}/{case.n_heads}/{case.n_layers}, V {case.vocab_size}, batch {case.batch}"
    threads = torch.get_num_threads()
    print(f"\n{result['case']}: {shape}, prompt {case.prompt}, {case.new} new tokens, fp32, {threads} threads")
    for who, seconds in median.items():
        times = " ".join(f"{t:.2f}" for t in result["seconds"][who])
        print(f"  {who:8} {seconds:8.3f} s   {case.batch * case.new / seconds:8.2f} tokens/s   calls {times}")
    print(f"  speed    {median['theirs'] / median['ours']:8.2f} x   (to reach: {case.speed})")
    print(f"  equal    {result['same_tokens']:8.1%}     of the tokens", flush=True)
    if "memory" in result:
        ours, theirs = result["memory"]["ours"], result["memory"]["theirs"]
        ratio = (ours["peak"] - ours["imports"]) / (theirs["peak"] - theirs["imports"])
        print(f"  memory   {ratio:8.2f} x   (to reach: {case.memory}; less the imports)")
        for who, m in result["memory"].items():
            print(f"           {who}: peak {m['peak']:.2f} GiB, of which imports {m['imports']:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
