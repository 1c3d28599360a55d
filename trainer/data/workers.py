"""Running independent jobs in worker processes, with a progress bar: what the preparation of data needs of both."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import TypeVar

from trainer.errors import InputError

Job = TypeVar("Job")


def run_jobs(work: Callable[[Job], int], jobs: Sequence[Job], workers: int, done: Callable[[Job, int], None]) -> None:
    """Runs work(job) for every job in up to `workers` processes; done(job, result) here, as they finish.

    The first exception ends the rest at once and is raised. One worker means this process.
    """
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            done(job, work(job))
        return
    # Not forked from here, as the tokenizer's threads do not survive that, but from a server that has only imported:
    # importing takes a second or two, which would otherwise be paid by every worker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    _start_server(context)
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_start_worker) as pool:
        try:
            with _uninterrupted():  # it starts the workers, and one that is half started cannot be ended
                futures = {pool.submit(work, job): job for job in jobs}
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    f"a worker process died, probably for lack of memory; run again with fewer --workers than {workers}"
                ) from None
            raise


def _start_server(context: ForkServerContext) -> None:
    """Start the server, and with it all workers, deaf to Ctrl-C: this process tells of it and ends them."""
    resource_tracker.ensure_running()  # first: it lets the signals through again
    with _uninterrupted():
        forkserver.ensure_running()
    ready = context.Process(target=os.getpid)  # begins when the server has imported; this wait can be interrupted
    ready.start()
    ready.join()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block; processes that are started in it never hear of it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker() -> None:
    # One thread per process: the processes already fill the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing when quiet; counts tokens as well."""

    LINE_SECONDS = 10.0

    def __init__(self, name: str, total: int, quiet: bool) -> None:
        self._name, self._total, self._quiet = name, total, quiet
        self._done = self._tokens = 0
        self._start = self._last_line = time.monotonic()
        self._seconds = 0.0
        self._bar = None
        if not quiet and total and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[rate]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, rate="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._seconds = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int, tokens: int = 0) -> None:
        self._done += amount
        self._tokens += tokens
        self._seconds = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self.rate() if self._tokens else "")
        elif time.monotonic() - self._last_line >= self.LINE_SECONDS:
            self._last_line = time.monotonic()
            rate = f", {self.rate()}" if self._tokens else ""
            self.say(self._quiet, f"{self._name}: {self._done / self._total:.0%}{rate}")

    def rate(self) -> str:
        """Tokens per second since the start, in words."""
        return f"{self._tokens / max(self._seconds, 1e-9):,.0f} tokens/s"

    @staticmethod
    def say(quiet: bool, text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)
