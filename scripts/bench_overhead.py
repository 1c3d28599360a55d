"""The trainer's own share of a step: wall time that is neither forward, backward nor optimizer, saves included.

Trains a recipe in this process for some steps without evaluation, and reads the share from its metrics.jsonl: of each
row, 1 - (time_forward_s + time_backward_s + time_optimizer_s) / wall time per step. The first row, which has the
start in it, is left out. Example: python scripts/bench_overhead.py yaml/mpt-tiny.yaml --steps 100
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from trainer import InputError, load_config, run
from trainer.loggers import PARTS


def shares(folder: Path, tokens_per_step: int) -> dict[str, list[float]]:
    """Per row of a run's metrics.jsonl, the first left out: each part's share of the wall time, and all that is own."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    out: dict[str, list[float]] = {part: [] for part in (*PARTS, "own")}
    for row in [row for row in rows if "loss" in row][1:]:
        wall = tokens_per_step / row["tokens_per_s"]
        for part in PARTS:
            out[part].append(row[f"time_{part}_s"] / wall)
        out["own"].append(1 - sum(row[f"time_{part}_s"] for part in ("forward", "backward", "optimizer")) / wall)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="yaml/mpt-tiny.yaml", help="default: yaml/mpt-tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=60, help="steps to train (default 60)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        fixed = [f"save_folder={name}/run", f"max_duration={args.steps}ba", "eval_interval=0", "eval_loader=null"]
        fixed += ["export=false", "log_interval=5", f"save_interval={max(1, args.steps // 3)}ba"]
        try:
            config = load_config(args.recipe, [*fixed, *args.overrides])
            code = run(config)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        measured = shares(Path(name) / "run", config.global_train_batch_size * config.max_seq_len)
    print(f"\n{args.recipe}, {args.steps} steps, {args.threads} threads: share of a step's wall time")
    for part, values in measured.items():
        print(f"  {part:10} median {statistics.median(values):7.2%}   mean {statistics.mean(values):7.2%}")
    return code


if __name__ == "__main__":
    sys.exit(main())
