"""The command: arguments, exit codes, what it prints and who prints it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import write_shards
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import train
from trainer.errors import InputError

ROOT = Path(__file__).parent.parent
RECIPE = """\
run_name: small
max_seq_len: 16
max_duration: 50ba
global_train_batch_size: 8
precision: fp32
device: cpu
model: {{d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 100}}
train_loader: {{dataset: {{local: {data}}}}}
eval_loader: {{dataset: {{local: {data}}}}}
optimizer: {{lr: 1e-3}}
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RUN_NAME", "TORCHELASTIC_ERROR_FILE", "MPT_KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path):
    data = write_shards(tmp_path / "data", {"train": [range(1, 90)] * 20, "val": [range(1, 90)]}, vocab_size=100)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=data))
    return str(path)


def test_arguments_in_any_order():
    parsed = train.parse_arguments(["--check", "a.yaml", "seed=1", "--deep", "lr=2", "--world-size", "64"])
    assert parsed == train.Arguments("a.yaml", ["seed=1", "lr=2"], True, True, 64)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a RECIPE is required, such as yaml/mpt-tiny.yaml"),
        (["a.yaml", "--optimizer.lr=1"], "--optimizer.lr=1: settings have no dashes; write optimizer.lr=1"),
        (["a.yaml", "--lr", "1"], "unknown option --lr; settings are written key=value"),
        (["a.yaml", "--deep"], "--deep needs --check"),
        (["a.yaml", "--world-size", "8"], "--world-size needs --check"),
        (["a.yaml", "--check", "--world-size", "0"], "give at least 1"),
        (["a.yaml", "--che"], "unknown option --che"),
        (["nowhere.yaml"], "recipe nowhere.yaml does not exist"),
        (["yaml/mpt-125m.yaml", "optimizer=adamw"], "optimizer is a section"),
    ],
)
def test_bad_input_exits_with_2_and_one_error(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert train.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("error:") == 1 and not out


def test_check_prints_the_plan_and_trains_nothing(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([recipe, "--check", "--deep", "--world-size", "4"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "small -> runs/small",
        "4 processes x micro-batch 2 x 1 accumulated",
        "50 steps, 6,400 tokens",
        "100 sequences of 16",
        "val: every hash and id is right",
        "nothing was trained",
    ):
        assert expected in out, out
    assert not (tmp_path / "runs").exists()


def test_the_plan_needs_no_data(recipe, capsys):
    assert train.main([recipe, "--check", "train_loader.dataset.local=nowhere"]) == 2
    out, err = capsys.readouterr()
    assert "optimizer state" in out and "nothing was trained" not in out and "nowhere: there is no such folder" in err


def test_check_takes_the_world_size_of_torchrun(recipe, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main([recipe, "--check"]) == 2
    assert "not divisible by the 3 processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # rank 0 checks for all
    assert train.main([recipe, "--check"]) == 0
    assert capsys.readouterr().out == ""


def test_only_a_deep_check_reads_the_shards(recipe, capsys, tmp_path):
    shard = tmp_path / "data" / "train" / "shard-00003.bin"
    data = bytearray(shard.read_bytes())
    data[8] ^= 1
    shard.write_bytes(data)
    assert train.main([recipe, "--check"]) == 0
    assert train.main([recipe, "--check", "--deep"]) == 2
    assert "shard-00003.bin: shard altered" in capsys.readouterr().err


def test_check_looks_at_the_checkpoint_to_load(recipe, capsys, tmp_path, monkeypatch):
    from mpt import MptConfig, MptForCausalLM
    from mpt.checkpoint import open_checkpoint
    from mpt.convert import convert

    MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=100, max_seq_len=16)).save_pretrained(
        tmp_path / "hf"
    )
    assert train.main([recipe, "--check", "--deep", f"load_path={tmp_path / 'hf'}"]) == 0
    assert "names and shapes are right" in capsys.readouterr().out
    convert(open_checkpoint(tmp_path / "hf"), tmp_path / "rank0.pt")
    assert train.main([recipe, "--check", "--deep", f"load_path={tmp_path / 'rank0.pt'}"]) == 0
    assert "rank0.pt: names and shapes are right" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert train.main([recipe, "--check", "load_path=mosaicml/no-such-mpt"]) == 2
    assert "mosaicml/no-such-mpt is not a path here" in capsys.readouterr().err
    assert train.main([recipe, "--check", f"load_path={tmp_path / 'hf'}", "model.d_model=64"]) == 2
    assert "transformer.wte.weight" in capsys.readouterr().err


def test_the_runs_code_is_the_commands(recipe, monkeypatch):
    command = importlib.import_module("trainer.run")
    seen = []
    monkeypatch.setattr(command, "run", lambda config: seen.append(config) or 143)
    assert train.main([recipe, "seed=5"]) == 143
    assert seen[0].seed == 5


def test_an_error_of_the_run_is_printed_once(recipe, monkeypatch, capsys):
    command = importlib.import_module("trainer.run")

    def fail(config):
        raise InputError("save_folder is full")

    monkeypatch.setattr(command, "run", fail)
    assert train.main([recipe]) == 2
    assert capsys.readouterr().err == "error: save_folder is full\n"


def test_processes_of_one_torchrun_print_an_error_once_and_hand_it_over(recipe, monkeypatch, capsys, tmp_path):
    printed = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        folder = tmp_path / "attempt_0" / rank
        folder.mkdir(parents=True)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        assert train.main([recipe, "seed=x"]) == 2
        printed.append(capsys.readouterr().err)
        failure = ProcessFailure(int(rank), 17, 2, str(folder / "error.json"))  # as torchrun reads it
        assert "seed: expected an integer" in failure.message["extraInfo"]["py_callstack"] and failure.timestamp > 0
    assert printed[0].startswith("error: ") and printed[1] == ""


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "1")])
def test_a_broken_environment_is_bad_input(name, value, recipe, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert train.main([recipe, "--check"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: environment {name}=") and "torchrun" in error


def test_ctrl_c_outside_the_loop(recipe, monkeypatch, capsys):
    command = importlib.import_module("trainer.run")

    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert train.main([recipe]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last checkpoint\n"


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, train\n"
        "try:\n    train.main(['--help'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "key=value" in result.stdout and "exit codes" in result.stdout
