"""One rank of tests/launch.py: runs the trainings of a JSON list, each with its own rendezvous port."""

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def cut_after(step: int, number: int) -> None:
    """Send this process the signal once a step is done and reported, for good or until `restore` is called."""
    loop = import_module("trainer.run").Loop
    report = loop._report

    def reported(self: Any, row: dict[str, float]) -> None:
        report(self, row)
        if self.state.step == step:
            os.kill(os.getpid(), number)

    loop._report = reported
    loop.restore = lambda: setattr(loop, "_report", report)


def main(spec: Path, result: Path) -> None:
    from trainer import load_config, run

    loop = import_module("trainer.run").Loop
    codes: list[int] = []
    for item in json.loads(spec.read_text())["runs"]:
        os.environ["MASTER_PORT"] = str(item["port"])
        cut = "signal" in item and int(os.environ["RANK"]) == item.get("on_rank", 0)
        if cut:
            cut_after(item["after"], item["signal"])
        codes.append(run(load_config(item["recipe"], item["overrides"])))
        if cut:
            loop.restore()
        result.write_text(json.dumps(codes))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only a run's own handlers listen to it
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    import_module("trainer.parallel").leave(0)
