"""A thread that reads the coming steps' batches while the current one trains."""

import queue
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from trainer.data.batches import TokenBatches
from trainer.data.finetune import ExampleBatches

Arrays = list[npt.NDArray[np.int64]]


class Prefetcher:
    """Keeps the arrays of the next `depth` steps ready, from `start_step` on; depth 0 reads when asked, no thread.

    micro_batches(step) gives the row ranges of this rank's micro-batches; `get(step)` their arrays, each int64
    (len(range), ...) as the batches' `batch` gives them. An exception of the reading thread is raised by the `get` of
    its step. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        batches: TokenBatches | ExampleBatches,
        micro_batches: Callable[[int], list[range]],
        start_step: int,
        depth: int,
    ) -> None:
        self._batches = batches
        self._micro_batches = micro_batches
        self._next = start_step
        self._stop = threading.Event()
        self._ready: queue.Queue[Arrays | BaseException] = queue.Queue(maxsize=max(1, depth))
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._thread = threading.Thread(target=self._work, args=(start_step,), name="prefetch", daemon=True)
            self._thread.start()

    def get(self, step: int) -> Arrays:
        """The arrays of `step`; steps are asked for one after the other (ValueError otherwise)."""
        if step != self._next:
            raise ValueError(f"step {step} asked for, but {self._next} is next: a new order needs a new Prefetcher")
        if self._stop.is_set():
            raise ValueError("this Prefetcher is closed")
        if self._thread is None:
            item: Arrays | BaseException = self._read(step)
        else:
            item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._next += 1
        return item

    def close(self) -> None:
        """Stops the thread and drops what it had ready. Safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, step: int) -> Arrays:
        ranges = self._micro_batches(step)
        # One call for all: finding the sequences costs about as much for 8 rows as for 256.
        ids = self._batches.batch(step, [row for rows in ranges for row in rows])
        ends = np.cumsum([len(rows) for rows in ranges])
        return np.split(ids, ends[:-1])

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                item: Arrays | BaseException = self._read(step)
            except BaseException as error:  # handed to the consumer, whose step it concerns
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1
