"""Where a run reports: the console, metrics.jsonl, wandb, tensorboard, and at the end loss.png and summary.json."""

import collections
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trainer.errors import InputError
from trainer.history import History, drop_rows, plain, replace_file, versions
from trainer.metrics import PARTS

TRAIN_COLUMNS = (
    *("step", "tokens", "epoch", "loss", "lr", "grad_norm", "tokens_per_s", "tokens_per_s_device", "mfu", "memory_gib"),
    *(f"time_{part}_s" for part in PARTS),
)
EVAL_COLUMNS = ("step", "tokens", "eval_loss", "eval_perplexity", "eval_token_accuracy")

# Rows that may wait for wandb or tensorboard before new ones are dropped: hours of a run that logs every few seconds.
QUEUE_ROWS = 10_000
# How long the end of a run waits for each of them.
CLOSE_SECONDS = 30.0

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases. Whatever is null comes from WANDB_PROJECT, WANDB_NAME, WANDB_MODE, ... where those are set.

    name: null is the run's name. mode: "offline" writes to the run folder only, for `wandb sync` later.
    """

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: Literal["online", "offline"] | None = None


@dataclass(frozen=True)
class TensorboardConfig:
    """tensorboard event files. log_dir: a folder inside the run folder."""

    log_dir: str = "tensorboard"

    def __post_init__(self) -> None:
        path = PurePosixPath(self.log_dir)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise InputError(f"loggers.tensorboard.log_dir={self.log_dir!r} has to be a folder inside the run folder")


@dataclass(frozen=True)
class LoggersConfig:
    """Reports besides metrics.jsonl, which is always written. progress: a bar with ETA where stdout is a terminal."""

    wandb: WandbConfig | None = None
    tensorboard: TensorboardConfig | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "loggers.tensorboard is set, but tensorboard is not installed: pip install 'mpt-train[tensorboard]', "
                "or remove the key (metrics.jsonl is written anyway)"
            )


class Loggers:
    """All reports of one run; on ranks other than 0 every method does nothing.

    After the constructor nothing here raises for lack of disk, network or a working wandb: a problem is told once and
    the run goes on. A row must have exactly the columns of its kind (ValueError otherwise), None where there is no
    value.
    """

    def __init__(
        self,
        config: LoggersConfig,
        run_folder: Path,
        *,
        rank: int,
        resume_step: int,
        run_name: str,
        run_config: str,
        total_steps: int,
        console: Console | None = None,
    ) -> None:
        """resume_step: updates already done; rows after it, of a run that was cut, are removed from metrics.jsonl.
        run_config: the resolved YAML, which wandb stores without its secrets. total_steps: the whole run's.

        Raises InputError if metrics.jsonl cannot be written.
        """
        self._active = rank == 0
        if not self._active:
            return
        self._folder, self._run_name = run_folder, run_name
        self._resume_step, self._total_steps = resume_step, total_steps
        self._told_lost_rows = False
        self._console = _Terminal(console or Console(), bar=config.progress, done=resume_step, total=total_steps)
        self._eta = _Eta(resume_step, total_steps)
        self._file = _open_metrics(run_folder / "metrics.jsonl", resume_step, self.message)
        kept = History.read(run_folder / "metrics.jsonl", resume_step)
        self._evaluated = {step for step, _ in kept.validation}
        self._background = []
        if config.wandb is not None:
            wandb = _Wandb(config.wandb, run_folder, run_name, run_config, resume_step, self._console.print)
            self._background.append(_Background("wandb", wandb, self._console.print))
        if config.tensorboard is not None:
            board = _Tensorboard(run_folder / config.tensorboard.log_dir, resume_step)
            self._background.append(_Background("tensorboard", board, self._console.print))

    def log(self, row: Row) -> None:
        """Report a training step: a row of TRAIN_COLUMNS."""
        if not self._active:
            return
        values = _checked(row, TRAIN_COLUMNS)
        eta = self._eta.after(int(values["step"] or 0))
        self._console.print(train_line(values, self._total_steps, eta))
        self._console.advance(int(values["step"] or 0), eta)
        self._record(values, "train")

    def evaluation(self, row: Row) -> None:
        """Report an evaluation: a row of EVAL_COLUMNS. One of a step that metrics.jsonl holds already is printed only:
        a run that goes on from a checkpoint may have to repeat it.
        """
        if not self._active:
            return
        values = _checked(row, EVAL_COLUMNS)
        right = values["eval_token_accuracy"]
        accuracy = "" if right is None else f"  token accuracy {right:.2%}"
        self._console.print(
            f"step {values['step']}/{self._total_steps}  validation loss {_fixed(values['eval_loss'], '.4f')} nats  "
            f"perplexity {_fixed(values['eval_perplexity'], ',.2f')}{accuracy}"
        )
        if values["step"] not in self._evaluated:
            self._evaluated.add(int(values["step"] or 0))
            self._record(values, "eval")

    def message(self, text: str) -> None:
        """Print a line or several."""
        if self._active:
            self._console.print(text)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json and loss.png, and let wandb and tensorboard finish (for CLOSE_SECONDS at most).

        summary: what the run knows of itself; it is completed with the last and best losses, the median throughput and
        the versions. Its `unigram_entropy` (nats), if any, is drawn into loss.png as a reference. Call it when the run
        ends for whatever reason: within an `except` or `finally` block of an error it marks wandb's run as failed.
        """
        if not self._active:
            return
        self._active = False
        failed = sys.exception() is not None
        try:
            history = History.read(self._folder / "metrics.jsonl", self._resume_step)
            whole = {"run_name": self._run_name, **history.summary(), **summary, "versions": versions()}
            replace_file(self._folder / "summary.json", (json.dumps(plain(whole), indent=2) + "\n").encode())
            history.plot(self._folder / "loss.png", self._run_name, summary.get("unigram_entropy"))
        except Exception as e:  # A report that cannot be written must not turn a finished run into a failed one.
            self._console.print(f"warning: the run's summary could not be written: {type(e).__name__}: {e}")
        for background in self._background:
            background.close(failed)
        self._console.close()
        os.close(self._file)

    def _record(self, row: dict[str, float | None], kind: str) -> None:
        """Append to metrics.jsonl, whole or not at all, and pass the row on to wandb and tensorboard."""
        line = (json.dumps(plain(row)) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("disk full")
        except OSError as e:
            os.ftruncate(self._file, size)
            if not self._told_lost_rows:
                self._told_lost_rows = True
                self.message(f"warning: metrics.jsonl misses rows from step {row['step']} on: {e}; training goes on")
        for background in self._background:
            background.put(kind, row)


def train_line(row: Row, total_steps: int, eta_s: float | None) -> str:
    """The console's line for a training row, each number with its unit."""
    parts = [
        f"step {row['step']}/{total_steps}",
        f"epoch {_fixed(row['epoch'], '.2f')}",
        f"loss {_fixed(row['loss'], '.4f')} nats",
        f"lr {_fixed(row['lr'], '.2e')}",
        f"grad norm {_fixed(row['grad_norm'], '.3f')}",
        f"{_fixed(row['tokens_per_s'], ',.0f')} tokens/s ({_fixed(row['tokens_per_s_device'], ',.0f')}/device)",
    ]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    parts.append(f"{_fixed(row['memory_gib'], '.2f')} GiB")
    times = [(part, row[f"time_{part}_s"]) for part in PARTS]
    parts.append(" + ".join(f"{part} {_fixed(s, '.3f')}" for part, s in times if part != "save" or s) + " s")
    if eta_s is not None:
        parts.append(f"ETA {duration(eta_s)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front where there are any."""
    whole = int(seconds + 0.5)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    clock = f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{days}d {clock}" if days else clock


def _fixed(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _checked(row: Row, columns: tuple[str, ...]) -> dict[str, float | None]:
    if set(row) != set(columns):
        missing, unknown = sorted(set(columns) - set(row)), sorted(set(row) - set(columns))
        raise ValueError(f"a metrics row has to have the columns {columns}: missing {missing}, unknown {unknown}")
    return {column: row[column] for column in columns}


# --- metrics.jsonl


def _open_metrics(path: Path, resume_step: int, warn: Callable[[str], None]) -> int:
    """A descriptor that appends to `path`, from which rows after resume_step and torn lines are removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        dropped = drop_rows(path, resume_step) if path.exists() else 0
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as e:
        raise InputError(f"{path} cannot be written ({e.strerror}); choose another save_folder") from e
    if dropped:
        warn(f"metrics.jsonl: {dropped} rows after step {resume_step} removed, the run goes on from there")
    return descriptor


# --- the console


class _Terminal:
    """Lines on stdout, above a progress bar where that is a terminal. Safe to print to from other threads."""

    def __init__(self, console: Console, *, bar: bool, done: int, total: int) -> None:
        self._console = console
        self._bar: Progress | None = None
        if bar and console.is_terminal:
            columns = BarColumn(None), MofNCompleteColumn(), TextColumn("steps  ETA {task.fields[eta]}")
            # Redrawn when a row comes, not by a thread of its own: training has the processor.
            self._bar = Progress(*columns, console=console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task("", completed=done, total=total, eta="-")

    def print(self, text: str) -> None:
        encoding = self._console.encoding
        # A model's sample may hold anything: control characters and what the terminal's encoding lacks.
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            if self._bar is not None:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                self._console.file.write(text + "\n")
                self._console.file.flush()
        except OSError:
            pass  # Nobody reads stdout any more (a closed pipe, say); the files still tell everything.

    def advance(self, step: int, eta_s: float | None) -> None:
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._task, completed=step, eta="-" if eta_s is None else duration(eta_s), refresh=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Eta:
    """Seconds to the end, from the wall time of the last 32 rows: evaluations and saves count, start-up does not."""

    def __init__(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._start = (time.monotonic(), step)
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=32)

    def after(self, step: int) -> float | None:
        now = time.monotonic()
        then, step_then = self._marks[0] if self._marks else self._start
        self._marks.append((now, step))
        if step <= step_then:
            return None
        return (self._total - step) * (now - then) / (step - step_then)


# --- wandb and tensorboard, each in a thread of its own


class _Target(Protocol):
    def open(self) -> None: ...

    def write(self, kind: str, row: Row) -> None: ...

    def close(self, failed: bool) -> None: ...


class _Background:
    """Feeds a target from a queue in a thread, so that a slow, hanging or failing one costs the run nothing.

    Rows that find the queue full are dropped. The first problem is told, once; after an error no row is passed on.
    """

    def __init__(self, name: str, target: _Target, warn: Callable[[str], None]) -> None:
        self._name, self._target, self._warn = name, target, warn
        self._queue: queue.SimpleQueue[tuple[str, Row] | None] = queue.SimpleQueue()
        self._warned = self._broken = self._failed = False
        # A daemon: what hangs there must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"{name} rows", daemon=True)
        self._thread.start()

    def put(self, kind: str, row: Row) -> None:
        if self._broken:
            return
        if self._queue.qsize() < QUEUE_ROWS:
            self._queue.put((kind, row))
        else:
            self._tell(f"it does not keep up, rows from step {row['step']} on may be missing there")

    def close(self, failed: bool) -> None:
        self._failed = failed
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._tell(f"it did not finish within {CLOSE_SECONDS:g} s of the run's end, rows may be missing there")

    def _run(self) -> None:
        try:
            self._target.open()
            while (item := self._queue.get()) is not None:
                self._target.write(*item)
            self._target.close(self._failed)
        except (Exception, SystemExit) as e:
            self._broken = True
            self._tell(f"{type(e).__name__}: {' '.join(str(e).split())}")

    def _tell(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"warning: {self._name}: {problem}; the run goes on, metrics.jsonl has every row")


class _Wandb:
    """Rows in Weights & Biases: train/COLUMN and eval/COLUMN against `step`."""

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        run_name: str,
        run_config: str,
        resume_step: int,
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._run_name = config, folder, run_name
        self._run_config, self._resume_step, self._warn = run_config, resume_step, warn
        self._run: Any = None

    def open(self) -> None:
        import wandb

        c, environment = self._config, os.environ
        # Its own timeouts have to end before CLOSE_SECONDS do: the exit of the process waits for them.
        timeout = CLOSE_SECONDS / 3
        options: dict[str, Any] = {
            "project": c.project or environment.get("WANDB_PROJECT") or "mpt-train",
            "name": c.name or environment.get("WANDB_NAME") or self._run_name,
            "id": environment.get("WANDB_RUN_ID") or self._run_id(),
            "dir": environment.get("WANDB_DIR") or str(self._folder),
            "tags": list(c.tags) or None,
            "entity": c.entity,
            "group": c.group,
            "config": redact(yaml.safe_load(self._run_config)),
            "settings": wandb.Settings(console="off", init_timeout=timeout, finish_timeout=timeout),
            "mode": c.mode,
        }
        options = {key: value for key, value in options.items() if value is not None}
        if (c.mode or environment.get("WANDB_MODE") or "online") == "online":
            self._run = self._init_online(options)
        else:
            self._run = wandb.init(**options)
        # A resumed run repeats steps, which wandb's own counter refuses; `step` as the axis does not.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _init_online(self, options: dict[str, Any]) -> Any:
        """wandb's run, continued if the run folder's is; an offline one if there is no server or no key."""
        import wandb

        problem = "no API key (`wandb login`, WANDB_API_KEY, or loggers.wandb.mode=offline)"
        try:
            # Left to itself wandb would ask for a key from this thread, in the middle of the progress bar.
            if wandb.login(prompt=False, verify=False):
                return wandb.init(**{"resume": os.environ.get("WANDB_RESUME", "allow"), **options})
        except Exception as e:
            problem = f"{type(e).__name__}: {' '.join(str(e).split())}"
        self._warn(f"warning: wandb: {problem}; rows go to {options['dir']}/wandb, for `wandb sync` later")
        # Under an id of its own: wandb keeps that of the attempt above as being in use.
        return wandb.init(**{**options, "mode": "offline", "id": secrets.token_hex(4)})

    def write(self, kind: str, row: Row) -> None:
        self._run.log({"step": row["step"], **_tagged(kind, row)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _run_id(self) -> str:
        """wandb's id of this run, kept in the run folder so that resuming continues the same one."""
        path = self._folder / "wandb-id"
        if self._resume_step and path.exists():
            return path.read_text().strip()
        name = secrets.token_hex(4)
        path.write_text(name + "\n")
        return name


class _Tensorboard:
    """Rows as tensorboard scalars, train/COLUMN and eval/COLUMN."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder, self._resume_step = folder, resume_step
        self._writer: Any = None

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = self._resume_step + 1 if self._resume_step else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)

    def write(self, kind: str, row: Row) -> None:
        for name, value in _tagged(kind, row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self, failed: bool) -> None:
        self._writer.close()


def _tagged(kind: str, row: Row) -> dict[str, float]:
    return {
        f"{kind}/{column.removeprefix('eval_')}": value
        for column, value in row.items()
        if value is not None and column != "step"
    }


SECRET_KEY = re.compile(r"(^|[_-])(api[_-]?key|access[_-]?key|secret|password|passwd|credentials?|token)$", re.I)
SPECIAL_TOKEN = re.compile(r"(pad|bos|eos|unk|sep|cls|mask|image|system)_token$", re.I)
SECRET_VALUE = re.compile(r"\b(hf|sk|gh[pousr]|github_pat|glpat|xox[bp])[_-]\w{16,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


def redact(value: Any, key: str = "") -> Any:
    """A configuration without its secrets: values under keys such as api_key, token or password, well-known kinds of
    access token, and user:password in URLs.
    """
    if isinstance(value, Mapping):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    if value is not None and SECRET_KEY.search(key) and not SPECIAL_TOKEN.search(key):
        return "<redacted>"
    return SECRET_VALUE.sub("<redacted>", value) if isinstance(value, str) else value
