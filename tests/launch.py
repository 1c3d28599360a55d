"""Several ranks for a test: worker processes that run a list of trainings, without the cost of a torchrun each."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with one thread per process and the repository importable."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **extra}


def launch(world_size: int, runs: list[dict[str, Any]], folder: Path, timeout_s: float = 240.0) -> list[list[int]]:
    """Run each of `runs` on `world_size` ranks, one after the other in the same processes.

    A run is {"overrides": [key=value, ...], "recipe": path} and, if it is to be cut, {"signal": number, "after": step,
    "on_rank": rank}: that rank sends itself the signal once the step is done. Returns the exit codes by rank and run;
    a rank that was killed has none from that run on. As torchrun does, one that dies takes the others with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"runs": [{"port": free_port(), **run} for run in runs]}))
    results = [folder / f"codes-{rank}.json" for rank in range(world_size)]
    for path in results:
        path.unlink(missing_ok=True)
    logs = [(folder / f"log-{rank}.txt").open("w") for rank in range(world_size)]
    command = [sys.executable, str(ROOT / "tests" / "run_worker.py"), str(spec)]
    workers = [
        subprocess.Popen(
            [*command, str(results[rank])],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1"),
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        while any(w.poll() is None for w in workers):
            if any(w.poll() not in (None, 0) for w in workers):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"workers did not end: {_tails(folder, world_size)}")
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for log in logs:
            log.close()
    crashed = [w.returncode for w in workers if w.returncode not in (0, -signal.SIGKILL)]
    assert not crashed, f"a worker failed: {_tails(folder, world_size)}"
    return [json.loads(path.read_text()) if path.exists() else [] for path in results]


def _tails(folder: Path, world_size: int) -> str:
    return "\n".join(f"rank {r}: {(folder / f'log-{r}.txt').read_text()[-3000:]}" for r in range(world_size))
