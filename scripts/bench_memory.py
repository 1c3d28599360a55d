"""Train a recipe for a few steps in processes of its own; compare the memory it takes with what --check predicts."""

import argparse
import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any


def measure(recipe: str, overrides: list[str], steps: int = 2, processes: int = 1) -> dict[str, Any]:
    """A run of so many steps in new processes, without saving, evaluating or exporting.

    predicted_bytes: the plan's memory of one process, and by kind. measured_bytes: the most that a process held, less
    what it held when everything was imported, of the largest. cpu_s, wall_s: of its last step, data included.
    """
    context = multiprocessing.get_context("spawn")
    started: list[tuple[Any, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        for rank in map(str, range(processes)):
            receiver, sender = context.Pipe(duplex=False)
            environment = common | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            process = context.Process(target=_child, args=(recipe, overrides, steps, folder, environment, sender))
            process.start()
            sender.close()
            started.append((process, receiver))
        outcomes: list[dict[str, Any]] = []
        for _, receiver in started:
            try:
                outcomes.append(receiver.recv())
            except EOFError:
                outcomes.append({"error": "a process was killed: there is less memory than the run takes"})
        for process, _ in started:
            process.join()
    for outcome in outcomes:
        if "error" in outcome:
            raise RuntimeError(outcome["error"])
    return max(outcomes, key=lambda outcome: outcome["measured_bytes"])


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _child(
    recipe: str, overrides: list[str], steps: int, folder: str, environment: dict[str, str], sender: Any
) -> None:
    os.environ.update(environment)
    try:
        sender.send(_measured(recipe, overrides, steps, folder))
    except Exception as e:
        sender.send({"error": f"{type(e).__name__}: {e}"})
        raise


def _measured(recipe: str, overrides: list[str], steps: int, folder: str) -> dict[str, Any]:
    import time
    from importlib import import_module

    from trainer.config import load_config, validate
    from trainer.parallel import world_size
    from trainer.plan import plan

    run: Any = import_module("trainer.run")  # the package has a function of that name
    times: list[tuple[float, float]] = []

    class Timed(run.Loop):
        def _update(self, loss: Any) -> Any:
            row = super()._update(loss)
            times.append((time.process_time(), time.perf_counter()))
            return row

    run.Loop, run._finish = Timed, lambda loop: None
    config = load_config(recipe, [
        *overrides, f"max_duration={steps}ba", f"save_folder={folder}/run", "eval_loader=null", "eval_first=false",
        "save_interval=0", "scheduler.t_warmup=0ba", "loggers.progress=false",
    ])  # fmt: skip
    predicted = plan(config, validate(config, world_size()), world_size())
    run.Checkpointer = _NoCheckpoints
    if config.lora is not None:
        import_module("peft")  # which brings transformers: no part of a step's memory
        if config.lora.base_bits is not None:
            import_module("bitsandbytes")
    before = _resident()
    started = time.process_time(), time.perf_counter()
    run.run(config)
    times.insert(0, started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (cpu0, wall0), (cpu1, wall1) = times[-2:]
    return {
        "recipe": recipe, "overrides": overrides, "tokens": predicted.micro_batch * config.max_seq_len,
        "predicted_bytes": predicted.total_memory, "measured_bytes": peak - before,
        "by_kind": {**predicted.memory, **{f"{k} (host)": v for k, v in predicted.host_memory.items()}},
        "cpu_s": cpu1 - cpu0, "wall_s": wall1 - wall0,
    }  # fmt: skip


class _NoCheckpoints:
    """In place of the trainer's: a save copies the state, which is no part of a step's memory."""

    failed = False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def restore(self, *_: Any) -> None: ...

    def save(self, *_: Any) -> None: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...

    def holds(self, _: int) -> bool:
        return True


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="its data has to be there; it runs on a CPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="values of max_seq_len, one run each")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that share the run (default 1)")
    parser.add_argument("--steps", type=int, default=2, help="of each run (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_intermixed_args(argv)
    for name in ("processes", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more")
    rows = []
    for length in args.lengths or [None]:
        overrides = [*args.overrides, "device=cpu", *([f"max_seq_len={length}"] if length else [])]
        try:
            rows.append(row := measure(args.recipe, overrides, args.steps, args.processes))
        except RuntimeError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
        gib = row["predicted_bytes"] / 2**30, row["measured_bytes"] / 2**30
        print(
            f"{row['tokens']:>9,} tokens: predicted {gib[0]:.2f} GiB, measured {gib[1]:.2f} GiB "
            f"({gib[0] / gib[1] - 1:+.1%}); {row['cpu_s']:.1f} s of CPU, {row['wall_s']:.1f} s for the last step"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
