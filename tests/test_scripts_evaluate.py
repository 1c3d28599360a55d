"""scripts/evaluate.py: its figures on one process and on two, its options, tasks, and what it refuses."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import edit_manifest, write_shards, write_tokenizer
from launch import ROOT, environment, free_port
from test_trainer_harness import write_tasks

from mpt import MptConfig, MptForCausalLM
from scripts import evaluate
from trainer import harness
from trainer.data import file_sha256

SHAPE = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 310, "max_seq_len": 16, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "export"
    torch.manual_seed(4)
    MptForCausalLM(MptConfig(**SHAPE)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    ids = np.random.default_rng(6).integers(0, 290, 250)
    splits = {"train": [ids[:40]], "val": [ids[:150], ids[150:]]}
    return write_shards(folder, splits, tokenizer_sha256=file_sha256(folder / "tokenizer.json"))


def results(path: Path, *argv: object) -> dict[str, Any]:
    assert evaluate.main([*map(str, argv), "--device", "cpu", "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def two_processes(*argv: object) -> list[subprocess.Popen[str]]:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "scripts/evaluate.py", *map(str, argv)],
            env=environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_two_processes_as_one(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """15 sequences, 4 at a time: in the last round a row of the second process repeats one and does not count."""
    command = [checkpoint, "--data", data, "--batch", "4", "--device", "cpu", "--json", tmp_path / "two.json"]
    workers = two_processes(*command)
    one = results(tmp_path / "one.json", checkpoint, "--data", data, "--batch", 3)["data"]
    said = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    two = json.loads((tmp_path / "two.json").read_text())["data"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert two.pop(name) == pytest.approx(one.pop(name), rel=1e-6)
    assert two.pop("tokens_per_s") > 0 and one.pop("tokens_per_s") > 0
    assert two == one
    assert one == {
        "folder": str(data),
        "split": "val",
        "seq_len": 16,
        "sequences": 15,
        "tokens": 15 * 15,
        "tokens_not_read": 10,
        "text_bytes": one["text_bytes"],
    }
    assert "loss" in said[0][0] and said[1][0] == ""


def test_options(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    found = results(
        out, checkpoint, "--data", data, "--split", "train", "--seq-len", 9, "--max-sequences", 3, "--dtype", "bfloat16"
    )
    assert found["checkpoint"] == str(checkpoint)
    found = found["data"]
    assert (found["seq_len"], found["sequences"], found["tokens"]) == (9, 3, 24)
    model = MptForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ids = torch.tensor(np.fromfile(data / "train" / "shard-00000.bin", "<u2")[:27].astype(np.int64)).view(3, 9)
    assert found["loss"] == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-3)
    said = capsys.readouterr().out
    assert f"loss           {found['loss']:.6f} nats per token\n" in said
    assert "24 predicted, in 3 sequences of 9; 13 of the split not read" in said and "bits per byte" in said


def test_a_checkpoint_without_tokenizer(checkpoint: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    MptForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "bare")
    found = results(tmp_path / "out.json", tmp_path / "bare", "--data", data)["data"]
    assert "note: " in capsys.readouterr().err
    assert found["loss"] == results(tmp_path / "out.json", checkpoint, "--data", data)["data"]["loss"]
    named = results(tmp_path / "out.json", tmp_path / "bare", "--data", data, "--tokenizer", data)["data"]
    assert named["loss"] == found["loss"] and "note" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_tasks(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    folder = write_tasks(tmp_path, ["", "", ""])
    found = results(
        tmp_path / "out.json", checkpoint, "--tasks", "own_choice,own_text", "--tasks-path", folder,
        "--limit", 2, "--num-fewshot", 0, "--max-length", 40, "--batch", 2,
    )["tasks"]  # fmt: skip
    assert set(found["results"]) == {"own_choice", "own_text"}
    assert found["n-samples"]["own_choice"]["effective"] == 2
    assert "own_choice" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_tasks_on_two_processes(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Each does a part of the requests, of every kind; the results are those of one, beside the loss on shards."""
    pytest.importorskip("lm_eval")
    folder = write_tasks(tmp_path, ["", "", ""])
    command = [checkpoint, "--data", data, "--tasks", "own_*", "--tasks-path", folder, "--max-length", 40, "--batch", 1]
    workers = two_processes(*command, "--device", "cpu", "--json", tmp_path / "two.json")
    one = results(tmp_path / "one.json", *command)
    said = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["data"]["loss"] == pytest.approx(one["data"]["loss"], rel=1e-6)
    assert set(two["tasks"]["results"]) == {"own_choice", "own_text", "own_say"}
    for task, metrics in one["tasks"]["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers and {name: two["tasks"]["results"][task][name] for name in numbers} == pytest.approx(numbers)
    assert "own_say" in said[0][0] and said[1][0] == ""


def test_refused(checkpoint: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*argv: object) -> str:
        assert evaluate.main([*map(str, argv), "--device", "cpu"]) == 2
        told: str = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("error: ") == 1
        return told

    assert "no does not exist; give a model's folder" in refused(tmp_path / "no", "--data", data)
    assert "there is no such folder; make it with" in refused(checkpoint, "--data", tmp_path / "no")
    other = write_shards(tmp_path / "other", {"val": [[1] * 40]})
    assert "tokenizer of SHA-256 000000000000..., the checkpoint's" in refused(checkpoint, "--data", other)
    edit_manifest(other, lambda m: m["splits"]["val"][0].update(max_id=310))
    assert "holds token id 310, vocab_size is 310" in refused(checkpoint, "--data", other)
    assert "there is no folder" in refused(checkpoint, "--data", data, "--json", tmp_path / "no" / "x.json")
    assert f"--json {tmp_path} cannot be written" in refused(checkpoint, "--data", data, "--json", tmp_path)

    for argv, told in (
        (["x"], "nothing to evaluate on"),
        (["x", "--tasks", "a", "--seq-len", "4"], "--seq-len needs --data"),
        (["x", "--data", "a", "--limit", "4"], "--limit needs --tasks"),
        (["x", "--data", "a", "--batch", "0"], "'0' is not a number from 1 on"),
        (["x", "--tasks", ","], "no names"),
    ):
        with pytest.raises(SystemExit):
            evaluate.parse(argv)
        assert told in capsys.readouterr().err


def test_a_missing_lm_eval_is_told_before_any_work(
    checkpoint: Path, data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate.main([str(checkpoint), "--data", str(data), "--tasks", "a", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert "--tasks needs lm-eval" in err and out == ""


def test_what_was_found_is_kept_where_tasks_fail(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise harness.InputError("no data")

    monkeypatch.setattr(harness, "find_tasks", lambda *_: harness.Tasks([], None))
    monkeypatch.setattr(harness, "run_tasks", fails)
    out = tmp_path / "out.json"
    command = [str(checkpoint), "--data", str(data), "--tasks", "a", "--device", "cpu", "--json", str(out)]
    assert evaluate.main(command) == 2
    assert json.loads(out.read_text())["data"]["sequences"] == 15


def test_out_of_memory(checkpoint: Path, data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(MptForCausalLM, "forward", fails)
    assert evaluate.main([str(checkpoint), "--data", str(data), "--batch", "8", "--device", "cpu"]) == 2
    assert "what would help: --batch 4; --dtype bfloat16" in capsys.readouterr().err


def test_infinite_numbers_are_null() -> None:
    given = {"a": float("nan"), "b": [np.float64(0.5), np.int64(3), None, True], 4: Path("x")}
    assert json.dumps(evaluate._plain(given)) == '{"a": null, "b": [0.5, 3, null, true], "4": "x"}'


def test_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/evaluation.md names every option, and its commands parse."""
    guide = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    options = set(re.findall(r"^ +(--[a-z][\w-]*)", capsys.readouterr().out, re.M)) - {"--help"}
    assert [option for option in sorted(options) if f"`{option}" not in guide] == []
    lines = [line for block in re.findall(r"^```\n(.*?)^```", guide, re.M | re.S) for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if "scripts/evaluate.py" in line]
    assert len(commands) >= 3
    for words in commands:
        evaluate.parse(words[words.index("scripts/evaluate.py") + 1 :])
