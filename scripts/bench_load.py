"""How fast a checkpoint loads, and in how much memory: from_pretrained beside safetensors' load_file and a copy.

Every load is in a process of its own, the kinds by turns, and the file is in the page cache. Memory is anonymous
memory, what the process owns: pages of the mapped file belong to the cache, which gives them up when they are needed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

SHAPES = {"125m": (768, 12, 12), "1b": (2048, 16, 24)}  # d_model, n_heads, n_layers
KINDS = ("from_pretrained", "load_file and copy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="of the model (default: 1b, 2.6 GB in bf16)")
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind, alternating")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)  # the process of one load
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measure(arguments.one, arguments.folder, arguments.device)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = _write(SHAPES[arguments.shape], Path(folder))
        command = [sys.executable, __file__, "--folder", folder, "--device", arguments.device, "--one"]
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.repeats):
            for kind in KINDS:
                done = subprocess.run([*command, kind], check=True, capture_output=True, text=True)
                runs[kind].append(json.loads(done.stdout.splitlines()[-1]))

    print(f"{arguments.shape}, {size / 1e9:.2f} GB onto {arguments.device}, medians of {arguments.repeats}")
    print(f"{'':20}{'seconds':>9}{'GB/s':>7}{'peak memory / size':>20}")
    medians = {}
    for kind, results in runs.items():
        medians[kind] = statistics.median(r["seconds"] for r in results)
        peak = statistics.median(r["peak"] for r in results) / size
        print(f"{kind:20}{medians[kind]:9.2f}{size / 1e9 / medians[kind]:7.2f}{peak:20.3f}")
    print(f"from_pretrained has {medians[KINDS[1]] / medians[KINDS[0]]:.2f} of the speed (goal 0.8; memory goal 1.15)")


def _write(shape: tuple[int, int, int], folder: Path) -> int:
    """A model's folder in bf16, of weights that are all alike; returns the bytes of the weights."""
    import torch

    from mpt import MptConfig
    from mpt.checkpoint import save_hf
    from mpt.config import count_parameters, parameter_shapes

    d_model, n_heads, n_layers = shape
    config = MptConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers, vocab_size=50368)
    tensors = [(name, torch.ones(shape, dtype=torch.bfloat16)) for name, shape in parameter_shapes(config).items()]
    save_hf(tensors, config, folder / "model", max_shard_size="1000GB")
    return count_parameters(config) * 2


def _measure(kind: str, folder: Path, device: str) -> dict[str, float]:
    """Seconds, and the peak of the anonymous memory above what the imports took, in bytes."""
    import torch
    from safetensors.torch import load_file

    from mpt import MptForCausalLM

    def reference() -> object:
        return {name: t.to(device, copy=True) for name, t in load_file(folder / "model" / "model.safetensors").items()}

    def ours() -> object:
        return MptForCausalLM.from_pretrained(folder / "model", device=device)

    if device == "cuda":
        torch.cuda.init()
    load: Callable[[], object] = ours if kind == KINDS[0] else reference
    before, stop, peak = _anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    loaded = load()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak[0] = max(peak[0], _anonymous())
    stop.set()
    watcher.join()
    assert loaded is not None
    return {"seconds": seconds, "peak": peak[0] - before}


def _anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
