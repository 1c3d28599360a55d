"""metrics.jsonl, the console in both modes, wandb and tensorboard that work, hang or fail, and the end of a run."""

import io
import json
import math
import re
import sys
import threading
import types
from dataclasses import dataclass, field

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from rich.console import Console

from trainer import history, loggers
from trainer.errors import InputError
from trainer.loggers import (
    EVAL_COLUMNS,
    TRAIN_COLUMNS,
    Loggers,
    LoggersConfig,
    TensorboardConfig,
    WandbConfig,
    duration,
    redact,
    train_line,
)

PARTS = ("data", "forward", "backward", "optimizer", "save")


def train_row(step, **values):
    row = dict.fromkeys(TRAIN_COLUMNS, 0.5)
    return {**row, "step": step, "tokens": step * 1024, "loss": 8.0 - step * 0.1, "mfu": None, **values}


def eval_row(step, loss=5.0, accuracy=None):
    row = {"step": step, "tokens": step * 1024, "eval_loss": loss, "eval_perplexity": math.exp(loss)}
    return {**row, "eval_token_accuracy": accuracy}


def open_loggers(
    folder, config=None, *, resume_step=0, rank=0, terminal=False, run_config="seed: 1\n", total_steps=100
):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    opened = Loggers(
        config or LoggersConfig(),
        folder,
        rank=rank,
        resume_step=resume_step,
        run_name="tiny",
        run_config=run_config,
        total_steps=100,
        console=console,
    )
    return opened, console.file


def rows_in(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- metrics.jsonl


def test_rows_are_in_the_file_at_once_with_the_agreed_columns(tmp_path):
    log, _ = open_loggers(tmp_path)
    log.log(train_row(1))
    log.evaluation(eval_row(1))
    first, second = rows_in(tmp_path)
    columns = "step tokens epoch loss lr grad_norm tokens_per_s tokens_per_s_device mfu memory_gib"
    assert " ".join(first) == columns + " " + " ".join(f"time_{part}_s" for part in PARTS)
    columns = ["step", "tokens", "eval_loss", "eval_perplexity", "eval_token_accuracy"]
    assert list(second) == columns == list(EVAL_COLUMNS)
    assert first["loss"] == 7.9 and first["mfu"] is None and first["step"] == 1
    log.close({})


def test_a_row_of_other_columns_is_refused(tmp_path):
    log, _ = open_loggers(tmp_path)
    with pytest.raises(ValueError, match=r"missing \['loss'\], unknown \['los'\]"):
        row = train_row(1, los=2.0)
        del row["loss"]
        log.log(row)
    with pytest.raises(ValueError, match=r"missing \['eval_loss'"):
        log.evaluation({"step": 1, "tokens": 2})
    log.close({})


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log, _ = open_loggers(tmp_path)
    log.log(train_row(1, loss=math.nan, grad_norm=math.inf, lr=np.float32(0.25), memory_gib=torch.tensor(2.0)))
    log.close({"odd": [math.nan, {"x": -math.inf}], "path": tmp_path})
    (row,) = rows_in(tmp_path)
    assert row["loss"] is None and row["grad_norm"] is None and row["lr"] == 0.25 and row["memory_gib"] == 2.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["odd"] == [None, {"x": None}] and summary["path"] == str(tmp_path)


def test_resuming_drops_later_rows_and_torn_lines(tmp_path):
    log, _ = open_loggers(tmp_path)
    for step in range(10, 60, 10):
        log.log(train_row(step))
        log.evaluation(eval_row(step))
    log.close({})
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(b'{"step": 20, "tokens"')
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:6]
    log, console = open_loggers(tmp_path, resume_step=30)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(kept)
    assert "5 rows after step 30 removed" in console.getvalue()
    log.log(train_row(40))
    log.close({})
    assert [row["step"] for row in rows_in(tmp_path)] == [10, 10, 20, 20, 30, 30, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl", "summary.json"]


@pytest.mark.parametrize("damage", [b"\0\0\0\0", b"not json\n", b'{"step": "3"}\n', b"[1]\n", b'{"step": 1}'])
def test_damaged_lines_are_left_out(tmp_path, damage):
    good = json.dumps(train_row(1)).encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(good + damage)
    log, _ = open_loggers(tmp_path, resume_step=5)
    log.log(train_row(6))
    log.close({})
    assert [row["step"] for row in rows_in(tmp_path)] == [1, 6]


def test_an_undamaged_file_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_row(1)) + "\n")
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    log, console = open_loggers(tmp_path, resume_step=1)
    log.close({})
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before and "removed" not in console.getvalue()


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*save_folder"):
        open_loggers(tmp_path / "file")


def test_a_full_disk_costs_rows_only(tmp_path, monkeypatch):
    log, console = open_loggers(tmp_path)
    log.log(train_row(1))
    real = loggers.os.write

    def half(descriptor, line):
        return real(descriptor, line[: len(line) // 2])

    monkeypatch.setattr(loggers.os, "write", half)
    log.log(train_row(2))
    log.log(train_row(3))
    monkeypatch.setattr(loggers.os, "write", real)
    log.log(train_row(4))
    log.close({})
    assert [row["step"] for row in rows_in(tmp_path)] == [1, 4]
    assert console.getvalue().count("misses rows from step 2 on: disk full") == 1


def test_other_ranks_do_nothing(tmp_path):
    log, console = open_loggers(tmp_path, LoggersConfig(wandb=WandbConfig()), rank=1)
    log.log(train_row(1))
    log.evaluation(eval_row(1))
    log.message("hello")
    log.close({})
    assert not list(tmp_path.iterdir()) and not console.getvalue()


# --- the console


def test_plain_lines(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    log, console = open_loggers(tmp_path)
    log.message("data: [2 shards]")
    for step, seconds in ((10, 100), (20, 10), (30, 10)):
        now[0] += seconds
        log.log(train_row(step, lr=6e-4, grad_norm=1.25, tokens_per_s=41234.4, tokens_per_s_device=20617.2))
    log.evaluation(eval_row(30))
    log.close({})
    lines = console.getvalue().splitlines()
    assert lines[0] == "data: [2 shards]"
    assert lines[1].startswith("step 10/100  epoch 0.50  loss 7.0000 nats  lr 6.00e-04  grad norm 1.250  ")
    assert "41,234 tokens/s (20,617/device)  0.50 GiB  data 0.500 + forward 0.500 + " in lines[1]
    # Start-up (100 s) counts in the first estimate only: then 1 s a step.
    assert [line.rpartition("  ")[2] for line in lines[1:4]] == ["ETA 0:15:00", "ETA 0:01:20", "ETA 0:01:10"]
    assert lines[4] == "step 30/100  validation loss 5.0000 nats  perplexity 148.41"
    assert "\x1b" not in console.getvalue() and len(lines) == 5


def test_a_terminal_gets_the_same_lines_above_a_bar(tmp_path):
    log, console = open_loggers(tmp_path, terminal=True)
    log.message("[bold]not markup[/bold]")
    log.log(train_row(10))
    log.evaluation(eval_row(10))
    log.log(train_row(100))
    log.close({})
    text = re.sub(r"\x1b\[\d+m", "", console.getvalue())
    assert "[bold]not markup[/bold]" in text and "step 10/100  epoch" in text and "validation loss" in text
    assert " 10/100 steps  ETA 0:" in text and "100/100 steps  ETA 0:00:00" in text and "━" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    log, console = open_loggers(tmp_path / "other", LoggersConfig(progress=False), terminal=True)
    log.log(train_row(10))
    log.close({})
    assert "━" not in console.getvalue() and "step 10/100" in console.getvalue()


def test_line_shows_mfu_and_a_save_when_there_is_one():
    line = train_line(train_row(3, mfu=0.4125, time_save_s=0.0), 100, None)
    assert "MFU 41.2%" in line and "save" not in line and "ETA" not in line
    assert "save 0.250 s" in train_line(train_row(3, time_save_s=0.25), 100, None)
    assert "loss nan nats" in train_line(train_row(3, loss=math.nan), 100, None)


def test_durations():
    shown = [duration(s) for s in (0, 59.6, 3599, 86399.9, 90061)]
    assert shown == ["0:00:00", "0:01:00", "0:59:59", "1d 0:00:00", "1d 1:01:01"]


def test_messages_survive_odd_text_and_a_closed_stdout(tmp_path):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for file in (Closed(), narrow):
        log = Loggers(
            LoggersConfig(), tmp_path, rank=0, resume_step=0, run_name="x", run_config="", total_steps=1,
            console=Console(file=file),
        )  # fmt: skip
        log.message("naïve \x1b[31m ♥")
        log.close({})
    assert narrow.buffer.getvalue().splitlines()[0] == rb"na\xefve \ufffd[31m \u2665"


# --- wandb and tensorboard


class FakeWandb(types.ModuleType):
    """As much of wandb as is used; keeps what it was given."""

    def __init__(self):
        super().__init__("wandb")
        self.rows, self.inits, self.finished, self.logged_in = [], [], [], True

    def login(self, **_):
        return self.logged_in

    def Settings(self, **options):
        return options

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    for name in ("PROJECT", "NAME", "MODE", "RUN_ID", "RESUME", "DIR", "API_KEY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


WITH_WANDB = LoggersConfig(wandb=WandbConfig())


def test_wandb_gets_every_row_and_a_config_without_secrets(tmp_path, wandb):
    config = {"seed": 17, "tokenizer": {"kwargs": {"token": "hf_abcdefghijklmnopqrstu", "pad_token": "<pad>"}}}
    log, console = open_loggers(tmp_path, WITH_WANDB, run_config=yaml.safe_dump(config))
    log.log(train_row(1))
    log.evaluation(eval_row(1))
    log.close({})
    (options,) = wandb.inits
    assert options["config"] == {
        "seed": 17,
        "tokenizer": {"kwargs": {"token": "<redacted>", "pad_token": "<pad>"}},
    }
    assert (options["project"], options["name"], options["dir"]) == ("mpt-train", "tiny", str(tmp_path))
    assert "mode" not in options and "entity" not in options and options["resume"] == "allow"
    train, validation = wandb.rows
    assert train["step"] == 1 and train["train/loss"] == 7.9 and "train/mfu" not in train
    assert validation == {"step": 1, "eval/tokens": 1024, "eval/loss": 5.0, "eval/perplexity": math.exp(5.0)}
    assert wandb.finished == [0] and "warning" not in console.getvalue()


def test_wandb_settings_and_environment(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from-env")
    monkeypatch.setenv("WANDB_NAME", "named-by-env")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.logged_in = False
    log, _ = open_loggers(tmp_path, WITH_WANDB)
    log.close({})
    explicit = WandbConfig(project="p", entity="e", name="n", group="g", tags=["a", "b"], mode="offline")
    log, _ = open_loggers(tmp_path, LoggersConfig(wandb=explicit))
    log.close({})
    first, second = wandb.inits
    assert (first["project"], first["name"]) == ("from-env", "named-by-env") and "resume" not in first
    got = [second[key] for key in ("project", "entity", "name", "group", "tags", "mode")]
    assert got == ["p", "e", "n", "g", ["a", "b"], "offline"]


def test_a_resumed_run_continues_its_wandb_run(tmp_path, wandb):
    for resume_step in (0, 20, 0):
        log, _ = open_loggers(tmp_path, WITH_WANDB, resume_step=resume_step)
        log.close({})
    first, resumed, anew = (options["id"] for options in wandb.inits)
    assert first == resumed != anew


def test_a_failed_run_is_marked(tmp_path, wandb):
    log, _ = open_loggers(tmp_path, WITH_WANDB)
    with pytest.raises(RuntimeError):
        try:
            raise RuntimeError("broken")
        finally:
            log.close({})
    assert wandb.finished == [1]


def _raise(*_, **__):
    raise ConnectionError("no route to host\n")


@pytest.mark.parametrize("method", ["Settings", "log", "finish"])
def test_a_failing_wandb_is_told_once_and_costs_nothing(tmp_path, wandb, method):
    setattr(wandb, method, _raise)
    log, console = open_loggers(tmp_path, WITH_WANDB)
    for step in range(1, 6):
        log.log(train_row(step))
    log.close({})
    assert len(rows_in(tmp_path)) == 5
    assert console.getvalue().count("warning: wandb: ConnectionError: no route to host; the run goes on") == 1


@pytest.mark.parametrize("reason", ["server", "key"])
def test_without_server_or_key_wandb_goes_offline(tmp_path, wandb, reason):
    online = wandb.init
    tried = []

    def init(**options):
        tried.append(options["id"])
        return online(**options) if options.get("mode") == "offline" else _raise()

    wandb.init = init
    wandb.logged_in = reason == "server"
    log, console = open_loggers(tmp_path, WITH_WANDB)
    log.log(train_row(1))
    log.close({})
    (options,) = wandb.inits
    assert options["mode"] == "offline" and "resume" not in options and len(wandb.rows) == 1
    assert len(set(tried)) == len(tried) == (2 if reason == "server" else 1)  # a failed attempt keeps its id
    told = {"server": "ConnectionError: no route to host; rows", "key": "no API key (`wandb login`"}[reason]
    assert console.getvalue().count(f"warning: wandb: {told}") == 1


def test_a_hanging_wandb_neither_slows_nor_stops_a_run(tmp_path, wandb, monkeypatch):
    released = threading.Event()
    wandb.init = lambda **_: released.wait(60)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(loggers, "QUEUE_ROWS", 3)
    log, console = open_loggers(tmp_path, WITH_WANDB)
    for step in range(1, 9):
        log.log(train_row(step))
    log.close({})
    (background,) = [t for t in threading.enumerate() if t.name == "wandb rows"]
    assert background.daemon and len(rows_in(tmp_path)) == 8 and (tmp_path / "summary.json").exists()
    assert console.getvalue().count("warning") == 1 and "rows from step 4 on may be missing" in console.getvalue()
    released.set()
    background.join(10)


def test_a_wandb_that_never_finishes_is_told(tmp_path, wandb, monkeypatch):
    released = threading.Event()
    wandb.finish = lambda exit_code: released.wait(60)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.1)
    log, console = open_loggers(tmp_path, WITH_WANDB)
    log.log(train_row(1))
    log.close({})
    assert "did not finish within 0.1 s" in console.getvalue()
    released.set()


def test_wandb_is_not_imported_unless_configured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    log, console = open_loggers(tmp_path)
    log.log(train_row(1))
    log.close({})
    assert "warning" not in console.getvalue()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggersConfig(tensorboard=TensorboardConfig())
    log, console = open_loggers(tmp_path, config)
    log.log(train_row(1))
    log.log(train_row(2))
    log.evaluation(eval_row(2))
    log.close({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [(1, 7.9), (2, 7.8)]
    assert [e.step for e in events.Scalars("eval/perplexity")] == [2] and "warning" not in console.getvalue()


def test_tensorboard_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'mpt-train\[tensorboard\]'"):
        LoggersConfig(tensorboard=TensorboardConfig())


@pytest.mark.parametrize("log_dir", ["/tmp/x", "../x", "a/../../b", ""])
def test_tensorboard_stays_in_the_run_folder(log_dir):
    with pytest.raises(InputError, match="inside the run folder"):
        TensorboardConfig(log_dir=log_dir)


@dataclass(frozen=True)
class Outer:
    loggers: LoggersConfig = field(default_factory=LoggersConfig)


def test_sections_work_as_structured_configurations():
    schema = OmegaConf.structured(Outer)
    values = {"loggers": {"wandb": {"tags": ["a"], "mode": "offline"}, "progress": False}}
    got = OmegaConf.to_object(OmegaConf.merge(schema, values))
    assert got.loggers == LoggersConfig(wandb=WandbConfig(tags=["a"], mode="offline"), progress=False)
    assert OmegaConf.to_object(OmegaConf.merge(schema, {"loggers": {"wandb": {}}})).loggers.wandb == WandbConfig()
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"loggers": {"wandb": {"mode": "sometimes"}}})


def test_redact():
    config = {
        "wandb": {"api_key": "x", "WANDB-API-KEY": "y"},
        "token": "t",
        "tokens": "1e9tok",
        "eos_token": "</s>",
        "tokenizer": "gpt-neox",
        "aws_secret": ["a", "b"],
        "password": 12,
        "remote": "https://me:pw@host/x",
        "note": "uses hf_ABCDEFGHIJKLMNOPQRST here",
        "model": {"n_heads": 4, "kv_key": "fine"},
    }
    assert redact(config) == {
        "wandb": {"api_key": "<redacted>", "WANDB-API-KEY": "<redacted>"},
        "token": "<redacted>",
        "tokens": "1e9tok",
        "eos_token": "</s>",
        "tokenizer": "gpt-neox",
        "aws_secret": ["<redacted>", "<redacted>"],
        "password": "<redacted>",
        "remote": "https://<redacted>@host/x",
        "note": "uses <redacted> here",
        "model": {"n_heads": 4, "kv_key": "fine"},
    }


# --- the end of a run


def test_summary(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_row(5, tokens_per_s=1e9)) + "\n")
    log, _ = open_loggers(tmp_path, resume_step=5)
    for step, rate in ((6, 10.0), (7, 400.0), (8, 420.0)):
        log.log(train_row(step, tokens_per_s=rate))
        log.evaluation(eval_row(step, loss=abs(step - 7) + 3.0))
    log.close({"step": 8, "tokens": 8192, "world_size": 2, "time_s": {"data": 0.5}, "unigram_entropy": 6.5})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["run_name"] == "tiny" and summary["step"] == 8 and summary["time_s"] == {"data": 0.5}
    assert summary["loss"] == 7.2 and summary["perplexity"] == pytest.approx(math.exp(7.2))
    assert (summary["eval_loss"], summary["best_eval_loss"], summary["best_eval_step"]) == (4.0, 3.0, 7)
    assert summary["tokens_per_s"] == 400.0 and summary["unigram_entropy"] == 6.5
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    log.close({})  # a second time does nothing
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_loss_png_shows_both_curves_and_the_reference(tmp_path):
    log, _ = open_loggers(tmp_path)
    for step in range(1, 101):
        log.log(train_row(step, loss=9.0 - step * 0.04, epoch=0.1))
        if step % 20 == 0:
            log.evaluation(eval_row(step, loss=9.1 - step * 0.04))
    log.close({"unigram_entropy": 7.5})
    pixels = matplotlib.image.imread(tmp_path / "loss.png")[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800

    def drawn(red, green, blue):
        return int((np.abs(pixels - np.array([red, green, blue]) / 255).max(axis=-1) < 0.02).sum())

    assert drawn(31, 119, 180) > 500 and drawn(255, 127, 14) > 200 and drawn(127, 127, 127) > 200


def test_a_run_without_rows_ends_quietly(tmp_path):
    log, console = open_loggers(tmp_path)
    log.close({"step": 0})
    assert (tmp_path / "summary.json").exists() and not (tmp_path / "loss.png").exists()
    assert not console.getvalue()


def test_a_summary_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    log, console = open_loggers(tmp_path)
    log.log(train_row(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loggers, "replace_file", full)
    log.close({})
    assert "warning: the run's summary could not be written" in console.getvalue()


def test_long_histories_are_thinned():
    points = [(step, float(step % 2)) for step in range(100_000)]
    steps, losses = history._thinned(points, 2000)
    assert len(steps) == 2000 and set(losses) == {0.5} and steps[0] == 24.5
