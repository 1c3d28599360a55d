"""Block inputs in host memory between forward and backward, while the device goes on computing."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Kept:
    """One block's input on the host. done: when its copy is there. back: on the device again, and when."""

    host: Tensor
    device: torch.device
    done: torch.cuda.Event | None
    back: tuple[Tensor, torch.cuda.Event | None] | None = None


class HostOffload:
    """Keeps the inputs of a forward's blocks in host memory: `with offload.input(x): y = block(x)` for each in turn.

    What autograd saves of x inside goes to the host, and x's memory on the device is free once the block is done with
    it; other tensors stay. The backward asks for the inputs last to first and finds them on the device again. On CUDA
    both copies run on a stream of their own, from and to pinned memory, the way back one block ahead. On a CPU they
    are plain copies, which save nothing. One object serves one forward.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []

    def input(self, x: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which x, if autograd saves it, is kept on the host."""
        wanted = _identity(x)  # autograd keeps this function, which must not keep x

        def pack(tensor: Tensor) -> Any:
            return self._keep(tensor) if _identity(tensor) == wanted else tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def _keep(self, x: Tensor) -> int:
        x = x.detach()
        if x.is_cuda:
            host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            stream = _copies(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                host.copy_(x, non_blocking=True)
                x.record_stream(stream)  # its memory is not given away before the copy is made
                done = stream.record_event()
            self._kept.append(_Kept(host, x.device, done))
        else:
            self._kept.append(_Kept(x.clone(), x.device, None))
        return len(self._kept) - 1

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        kept = self._kept[saved]
        self._fetch(kept)
        assert kept.back is not None
        x, event = kept.back
        kept.back = None
        if event is not None:
            current = torch.cuda.current_stream(x.device)
            current.wait_event(event)
            x.record_stream(current)
            if saved:
                self._fetch(self._kept[saved - 1])  # which the backward wants next
        return x

    def _fetch(self, kept: _Kept) -> None:
        """Begin the copy to the device, unless it has begun."""
        if kept.back is not None:
            return
        if kept.done is None:
            kept.back = kept.host.clone(), None
            return
        stream = _copies(kept.device)
        with torch.cuda.stream(stream):
            stream.wait_event(kept.done)
            x = kept.host.to(kept.device, non_blocking=True)
            kept.back = x, stream.record_event()


def _identity(x: Tensor) -> tuple[int, torch.Size, torch.dtype]:
    return x.data_ptr(), x.shape, x.dtype


@lru_cache(maxsize=16)
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's copies from and to the host."""
    return torch.cuda.Stream(device)
