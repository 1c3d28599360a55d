"""The commands as users run them: exit codes, messages, an abrupt end and going on, and the demo's corpus."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from data_files import documents, read_tokens, write_tokenizer

from scripts import demo_corpus, prepare_data
from trainer.data import scan, unigram_entropy

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "scripts" / "prepare_data.py")


@pytest.fixture
def paths(tmp_path):
    write_tokenizer(tmp_path / "t")
    texts = [f"text number {i}, a small one" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def arguments(paths, *more):
    return [str(paths / "a.jsonl"), "--out", str(paths / "out"), "--tokenizer", str(paths / "t"), *more]


def test_the_command_makes_shards(paths, capsys):
    assert prepare_data.main(arguments(paths, "--val-fraction", "0.2", "--workers", "1")) == 0
    tokenizer = paths / "t" / "tokenizer.json"
    train, val = (documents(paths / "out", split, tokenizer) for split in ("train", "val"))
    assert len(train) + len(val) == 200 and len(val) > 10
    assert "tokens/s" in capsys.readouterr().err
    assert prepare_data.main(arguments(paths, "--val-fraction", "0.2", "--workers", "3")) == 0
    assert "up to date" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(paths, capsys):
    assert prepare_data.main(arguments(paths, "--text-field", "body", "--workers", "1")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "a.jsonl, line 1: no field 'body'" in error and error.count("\n") == 1


def test_defaults(paths):
    options = prepare_data.parse(arguments(paths))
    assert (options.val_fraction, options.seed, options.text_field) == (0.005, 17, "text")
    assert prepare_data.parse(arguments(paths, "--val", "b.jsonl")).val_fraction == 0.0
    assert prepare_data.parse(arguments(paths, "--val", "b.jsonl")).val_inputs == ("b.jsonl",)


def test_ctrl_c_in_the_first_moments_is_one_line(paths, capsys, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "parse", interrupt)
    assert prepare_data.main(arguments(paths)) == 130
    assert capsys.readouterr().err.startswith("stopped; what is done is kept")


def test_nothing_of_ours_is_imported_before_it_can_be_interrupted():
    code = "import scripts.prepare_data, sys; sys.exit(any(n.startswith(('trainer', 'numpy')) for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def start(paths, out, *more, group=False):
    command = [sys.executable, SCRIPT, str(paths / "big.jsonl"), "--out", str(out), "--tokenizer", str(paths / "t")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A shell's background job has SIGINT ignored, and a program that inherits that rightly leaves it so.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [*command, *more], env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heard, start_new_session=group
    )


def children(pid):
    """Process ids whose parent is pid."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
def test_ctrl_c_while_workers_import_is_one_line(paths):
    """As a terminal sends it, to every process of the group."""
    (paths / "big.jsonl").write_text((json.dumps({"text": "some words to make it long " * 400}) + "\n") * 400)
    process = start(paths, paths / "out", "--workers", "2", group=True)
    deadline = time.monotonic() + 120
    while len(children(process.pid)) < 2 and time.monotonic() < deadline:  # the server of workers, and a tracker
        time.sleep(0.005)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert (process.returncode, error.count("\n")) == (130, 1), error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_anyhow_the_same_command_goes_on(paths, number):
    lines = [json.dumps({"text": f"{i} " + "some words to make it long " * 40}) for i in range(6000)]
    (paths / "big.jsonl").write_text("\n".join(lines))
    process = start(paths, paths / "out", "--workers", "2")
    deadline = time.monotonic() + 120
    while not list(paths.glob("out/.prepare/part-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "stopped; what is done is kept" in error and "Traceback" not in error
    while [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, "a worker outlived the command"
        time.sleep(0.05)
    assert not (paths / "out" / "manifest.json").exists()
    again = start(paths, paths / "out", "--workers", "2")
    assert "parts are there already" in again.communicate(timeout=120)[1]
    assert start(paths, paths / "reference", "--workers", "1").wait(timeout=120) == 0
    for split in ("train", "val"):
        assert read_tokens(paths / "out", split).tolist() == read_tokens(paths / "reference", split).tolist()


def test_the_demo_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_corpus, "CORPUS_BYTES", 400_000)
    monkeypatch.setattr(demo_corpus, "VOCAB_SIZE", 1024)
    monkeypatch.setattr(demo_corpus, "VAL_BYTES", 30_000)
    assert demo_corpus.main(["--out", str(tmp_path / "one"), "--workers", "1"]) == 0
    names, held_out = (
        [json.loads(line)["file"] for line in (tmp_path / "one" / name).read_text().strip().split("\n")]
        for name in ("corpus.jsonl", "validation.jsonl")
    )
    assert names == sorted(names) and held_out and not set(names) & set(held_out)
    assert not [name for name in names if {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))]
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert (manifest["eos_id"], manifest["tokenizer"]["vocab_size"], manifest["dtype"]) == (0, 1024, "uint16")
    assert scan(tmp_path / "one", "train", 1024) > 50_000
    assert scan(tmp_path / "one", "val", 1024) > 1000
    assert 4 < unigram_entropy(tmp_path / "one", "val") < 8
    capsys.readouterr()
    assert demo_corpus.main(["--out", str(tmp_path / "one"), "--workers", "1"]) == 0
    assert "up to date" in capsys.readouterr().err  # so corpus and tokenizer came out the same again
