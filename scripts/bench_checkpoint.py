"""How long a training loop stands still for a checkpoint: asynchronous saves beside synchronous ones."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from trainer.checkpoint import Checkpointer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=600, help="size of a checkpoint")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind, alternating")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()

    backend = "cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model, optimizer = _trained_model(arguments.megabytes, torch.device(arguments.device))
    size = sum(t.numel() * t.element_size() for t in model.parameters()) * 3
    blocked: dict[bool, list[float]] = {False: [], True: []}
    whole: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpointers = {
            asynchronous: Checkpointer(
                Path(folder) / str(asynchronous), keep=1, fingerprint={}, asynchronous=asynchronous, on_error="stop"
            )
            for asynchronous in blocked
        }
        for step in range(arguments.repeats):
            for asynchronous, checkpointer in checkpointers.items():
                started = time.perf_counter()
                checkpointer.save(step, model, optimizer, {})
                blocked[asynchronous].append(time.perf_counter() - started)
                checkpointer.wait()
                whole[asynchronous].append(time.perf_counter() - started)
        for checkpointer in checkpointers.values():
            checkpointer.close()
    dist.destroy_process_group()

    print(f"checkpoint of {size / 1e6:.0f} MB on {arguments.device}, medians of {arguments.repeats}, seconds")
    print(f"{'':14}{'loop blocked':>14}{'until committed':>18}")
    for asynchronous, label in ((False, "synchronous"), (True, "asynchronous")):
        print(
            f"{label:14}{statistics.median(blocked[asynchronous]):14.3f}{statistics.median(whole[asynchronous]):18.3f}"
        )
    ratio = statistics.median(blocked[True]) / statistics.median(blocked[False])
    print(f"an asynchronous save blocks for {ratio:.2f} of a synchronous one")


def _trained_model(megabytes: int, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Sharded layers and AdamW after a step; parameters and both moments in fp32 make up the size."""
    width = 2048
    layers = max(1, round(megabytes * 1e6 / (12 * width * width)))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(1, width, device=device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


if __name__ == "__main__":
    main()
