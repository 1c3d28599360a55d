"""Whole runs: what they leave, resuming bit for bit, ranks that agree, refusals that lose nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_shards, write_tokenizer
from launch import ROOT, environment, launch

from mpt.checkpoint import open_checkpoint
from mpt.convert import convert
from scripts import check_run, evaluate
from trainer import InputError, load_config, run

# `import trainer.run` would give the function of that name.
run_module = import_module("trainer.run")

RECIPE = """
run_name: toy
max_seq_len: 32
max_duration: 12ba
global_train_batch_size: 8
device_train_microbatch_size: 2
precision: fp32
device: cpu
log_interval: 1
eval_interval: 6ba
save_interval: 4ba
model:
  d_model: 32
  n_heads: 4
  n_layers: 2
  vocab_size: 304
  no_bias: true
  resid_pdrop: 0.1
  init_config: {name: kaiming_normal_, emb_init_std: 0.02}
train_loader: {dataset: {local: DATA}}
eval_loader: {dataset: {local: DATA}}
optimizer: {name: decoupled_adamw, lr: 1.0e-2, weight_decay: 1.0e-4}
scheduler: {name: cosine_with_warmup, t_warmup: 2ba}
loggers: {progress: false}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a text with structure to learn: a noisy walk over the ids."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.integers(1, 4, 12_000)) % 20 + 1
    ids[::50] = 0
    write_shards(folder, {"train": [ids[:5000], ids[5000:10_000]], "val": [ids[10_000:]]}, vocab_size=304)
    write_tokenizer(folder, vocab_size=304)
    edit = json.loads((folder / "manifest.json").read_text())
    import hashlib

    edit["tokenizer"]["sha256"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(edit))
    return folder


@pytest.fixture(scope="module")
def recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    path.write_text(RECIPE.replace("DATA", str(data)))
    return path


def rows(folder: Path, kind: str = "loss") -> dict[int, dict]:
    """metrics.jsonl by step: training rows, or with kind="eval_loss" evaluation rows; a step must not occur twice."""
    found: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if kind in row:
            assert row["step"] not in found, f"step {row['step']} was logged twice"
            found[row["step"]] = row
    return found


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, read by torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    out = folder / f"step-{step}.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step-{step}", out)
    return torch.load(out, weights_only=True)


def assert_same_state(a: Path, b: Path, step: int = 12) -> None:
    ours, theirs = saved(a, step), saved(b, step)
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("optim.") for key in ours)
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different


def assert_same_history(a: Path, b: Path) -> None:
    ours, theirs = rows(a), rows(b)
    assert list(ours) == list(theirs)
    assert [r["loss"] for r in ours.values()] == [r["loss"] for r in theirs.values()]
    assert {s: r["eval_loss"] for s, r in rows(a, "eval_loss").items()} == {
        s: r["eval_loss"] for s, r in rows(b, "eval_loss").items()
    }


def lines(folder: Path, until: int) -> list[str]:
    """The training rows of steps 1..until as they stand in metrics.jsonl, measured times included: a step that was
    computed again has other ones.
    """
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in text if "loss" in (row := json.loads(line)) and row["step"] <= until]


def cut(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM once `step` is done, in this process."""
    report = run_module.Loop._report

    def reported(self, row):
        report(self, row)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_module.Loop, "_report", reported)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 12-step run on one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(load_config(recipe, [f"save_folder={folder}"])) == 0
    return folder


def test_a_run_learns_and_leaves_its_results(whole: Path) -> None:
    import transformers

    from mpt import MptForCausalLM

    history = rows(whole)
    assert list(history) == list(range(1, 13))
    assert history[12]["loss"] < history[1]["loss"] - 0.2
    assert history[1]["lr"] == 0.0 and history[3]["lr"] == pytest.approx(1e-2)
    assert history[12]["tokens"] == 12 * 8 * 32
    assert list(rows(whole, "eval_loss")) == [6, 12]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["step"] == 12 and summary["unigram_entropy"] == pytest.approx(math.log(20), abs=0.2)
    assert (whole / "loss.png").stat().st_size > 5000
    assert (whole / "sample.txt").read_text().strip()
    assert (whole / "checkpoints" / "latest").read_text().strip() == "step-12"
    assert load_config(whole / "config.yaml") == load_config(whole / "config.yaml", ["seed=17"])
    theirs = transformers.MptForCausalLM.from_pretrained(whole / "export")
    ours = MptForCausalLM.from_pretrained(whole / "export")
    ids = torch.randint(300, (2, 20))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    assert float((a - b).abs().max() / b.abs().max()) <= 1e-5
    export = whole / "export" / "tokenizer.json"
    assert (
        export.read_bytes()
        == (Path(load_config(whole / "config.yaml").train_loader.dataset.local) / "tokenizer.json").read_bytes()
    )


def test_check_run_judges_loss_and_export(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_run.main([str(whole), "--margin=-5"]) == 0
    assert "learned" in capsys.readouterr().out
    assert check_run.main([str(whole), "--margin", "2"]) == 1
    out, err = capsys.readouterr()
    assert "DID NOT LEARN" in out and "ask for less (--margin)" in out and "Loading weights" not in err
    assert check_run.main([str(whole), "--margin=-5", "--tolerance", "0"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    assert check_run.main([str(tmp_path)]) == 2


def test_evaluation_is_the_mean_over_every_validation_token(whole: Path, data: Path) -> None:
    from mpt import MptForCausalLM

    ids = torch.from_numpy(np.fromfile(data / "val" / "shard-00000.bin", "<u2").astype(np.int64))
    sequences = ids[: len(ids) // 32 * 32].view(-1, 32)
    model = MptForCausalLM.from_pretrained(whole / "export")
    with torch.no_grad():
        logits = model(sequences).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 304), sequences[:, 1:].reshape(-1))
    assert rows(whole, "eval_loss")[12]["eval_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_run_evaluated_afterwards_gives_its_own_figure(whole: Path, data: Path, tmp_path: Path) -> None:
    """By the script, from its checkpoint and from its export."""
    own = rows(whole, "eval_loss")[12]
    for checkpoint in (whole, whole / "export"):
        command = [str(checkpoint), "--data", str(data), "--device", "cpu", "--json", str(tmp_path / "out.json")]
        assert evaluate.main(command) == 0
        found = json.loads((tmp_path / "out.json").read_text())["data"]
        assert found["loss"] == pytest.approx(own["eval_loss"], rel=1e-6)
        assert found["perplexity"] == pytest.approx(own["eval_perplexity"], rel=1e-5)


@pytest.mark.parametrize("step", range(1, 12))
def test_cut_at_any_step_and_resumed_it_is_the_same_run(
    step: int, recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(recipe, [f"save_folder={tmp_path / 'run'}", "device_train_microbatch_size=4", "export=false"])
    same = load_config(recipe, [f"save_folder={tmp_path / 'run'}", "export=false", "save_interval=5ba"])
    with monkeypatch.context() as m:
        cut(m, step)
        assert run(same) == 143
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{step}"
    before = lines(tmp_path / "run", step)
    assert len(before) == step
    assert run(same) == 0
    assert lines(tmp_path / "run", step) == before, "it began again instead of going on"
    assert_same_state(tmp_path / "run", whole)
    assert_same_history(tmp_path / "run", whole)
    assert run(config) == 0, "a finished run, started again with another micro-batch, has nothing left to do"
    assert list(rows(tmp_path / "run")) == list(range(1, 13))


@pytest.fixture(scope="module")
def ranks(recipe: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two ranks, one launch: 20 steps without dropout, the toy run, and the toy run cut by SIGTERM at two steps and
    resumed each time.
    """
    folder = tmp_path_factory.mktemp("ranks")
    names = {name: folder / name for name in ("long", "every", "replicated", "whole", "cut")}
    base = {"recipe": str(recipe)}
    term = {"signal": int(signal.SIGTERM), "on_rank": 1}
    cut = {**base, "overrides": [f"save_folder={names['cut']}"]}
    codes = launch(
        2,
        [
            {**base, "overrides": [*LONG, f"save_folder={names['long']}"]},
            {**base, "overrides": [*LONG, f"save_folder={names['every']}", "fsdp_config.reduce_every_microbatch=true"]},
            {**base, "overrides": [*LONG, f"save_folder={names['replicated']}", "fsdp_config.replicate=2"]},
            {**base, "overrides": [f"save_folder={names['whole']}"]},
            {**cut, **term, "after": 5},
            {**cut, **term, "after": 9},
            cut,
        ],
        folder / "workers",
    )
    assert codes == [[0, 0, 0, 0, 143, 143, 0]] * 2
    return names


LONG = ["max_duration=20ba", "model.resid_pdrop=0", "export=false", "run_name=long"]


def test_two_ranks_follow_the_curve_of_one(recipe: Path, ranks: dict[str, Path], tmp_path: Path) -> None:
    """Sharded over both, summing gradients once a step or after every micro-batch, and replicated on both."""
    assert run(load_config(recipe, [*LONG, f"save_folder={tmp_path}"])) == 0
    one = rows(tmp_path)
    for name in ("long", "every", "replicated"):
        two = rows(ranks[name])
        assert len(one) == len(two) == 20
        for step in one:
            assert two[step]["loss"] == pytest.approx(one[step]["loss"], abs=1e-5), f"{name}, step {step}"
            assert two[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-4), f"{name}, step {step}"


def test_two_ranks_stop_at_the_same_step_and_resume_bit_for_bit(ranks: dict[str, Path]) -> None:
    for step in (5, 9):
        assert (ranks["cut"] / "checkpoints" / f"step-{step}").is_dir()
    log = (ranks["cut"].parent / "workers" / "log-0.txt").read_text()
    assert [f"resuming after step {step} of 12" in log for step in (4, 5, 9)] == [False, True, True]
    assert_same_state(ranks["cut"], ranks["whole"])
    assert_same_history(ranks["cut"], ranks["whole"])


@pytest.mark.parametrize("step", [5, pytest.param(9, marks=pytest.mark.slow)])
def test_killed_two_ranks_resume_bit_for_bit(step: int, recipe: Path, ranks: dict[str, Path], tmp_path: Path) -> None:
    # Saved before the loop goes on, so that it is known where the second run begins.
    item = {"recipe": str(recipe), "overrides": [f"save_folder={tmp_path / 'run'}", "save_async=false"]}
    kill = {"signal": int(signal.SIGKILL), "after": step, "on_rank": 1}
    assert launch(2, [{**item, **kill}], tmp_path / "first")[1] == []
    last = step // 4 * 4
    before = lines(tmp_path / "run", last)
    assert len(before) == last
    assert launch(2, [item], tmp_path / "second") == [[0], [0]]
    assert lines(tmp_path / "run", last) == before, "it began again instead of going on"
    assert_same_state(tmp_path / "run", ranks["whole"])
    assert_same_history(tmp_path / "run", ranks["whole"])


@pytest.mark.slow
def test_two_then_one_then_four_ranks(recipe: Path, tmp_path: Path) -> None:
    """The same samples and, without dropout, the same curve; a fourth of the curve's run on four ranks throughout."""
    folder, reference = tmp_path / "run", tmp_path / "reference"
    item = {"recipe": str(recipe), "overrides": [*LONG, "save_interval=100ba", f"save_folder={folder}"]}
    overrides = {"recipe": str(recipe), "overrides": [*LONG, f"save_folder={tmp_path / 'four'}"]}
    assert run(load_config(recipe, [*LONG, f"save_folder={reference}"])) == 0
    term = {"signal": int(signal.SIGTERM)}
    assert launch(2, [{**item, **term, "after": 6}], tmp_path / "w2") == [[143], [143]]
    six = lines(folder, 6)
    assert launch(1, [{**item, **term, "after": 13}], tmp_path / "w1") == [[143]]
    thirteen = lines(folder, 13)
    assert launch(4, [item, overrides], tmp_path / "w4") == [[0, 0]] * 4
    assert lines(folder, 13) == thirteen and thirteen[:6] == six, "it began again instead of going on"
    for other in (folder, tmp_path / "four"):
        for step, row in rows(reference).items():
            assert rows(other)[step]["loss"] == pytest.approx(row["loss"], abs=1e-5), f"step {step}"
    assert list(rows(folder)) == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_stops_on_a_signal_and_resumes(how: int, recipe: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    command += [str(recipe), f"save_folder={folder}", "max_duration=2000ba", "save_interval=1000ba", "eval_interval=0"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        process.wait(60)
    step = int((folder / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert step >= 3 and max(rows(folder)) == step
    before = lines(folder, step)
    done = subprocess.run([*command[:-3], f"max_duration={step + 2}ba", "export=false"], cwd=ROOT, env=environment())
    assert done.returncode == 0
    assert lines(folder, step) == before, "it began again instead of going on"
    assert list(rows(folder)) == list(range(1, step + 3))


def test_load_path_takes_weights_only(recipe: Path, whole: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(whole / "export"), tmp_path / "ep0-ba12-rank0.pt")
    for name, source in (
        ("checkpoint", whole / "checkpoints" / "step-12"),
        ("export", whole / "export"),
        ("run", whole),
        ("composer", tmp_path / "ep0-ba12-rank0.pt"),
    ):
        folder = tmp_path / name
        config = load_config(
            recipe, [f"save_folder={folder}", f"load_path={source}", "max_duration=1ba", "export=false"]
        )
        assert run(config) == 0
        assert list(rows(folder)) == [1]
        assert rows(folder)[1]["lr"] == 0.0, "the schedule starts anew"
        # The first step's learning rate is 0, so the weights after it are those that were loaded.
        loaded, source_state = saved(folder, 1), saved(whole, 12)
        for key, value in source_state.items():
            if key.startswith("model."):
                assert torch.equal(loaded[key], value)


@pytest.mark.parametrize("setting", ["model.n_layers=3", "seed=18", "optimizer.lr=2e-3", "global_train_batch_size=16"])
def test_another_run_in_the_same_folder_is_refused(setting: str, recipe: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")}
    name, value = setting.split("=")
    with pytest.raises(InputError) as error:
        run(load_config(recipe, [f"save_folder={whole}", setting, "device_train_microbatch_size=2"]))
    text = str(error.value)
    assert name.split(".")[-1] in text and "->" in text and str(float(value) if "e" in value else value) in text
    assert before == {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")}


def test_durations_intervals_loggers_and_micro_batch_may_change(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(load_config(recipe, [f"save_folder={folder}", "max_duration=3ba", "export=false"])) == 0
    changed = ["max_duration=5ba", "eval_interval=1ba", "save_interval=1ba", "device_train_microbatch_size=8"]
    assert run(load_config(recipe, [f"save_folder={folder}", "export=false", "log_interval=2", *changed])) == 0
    assert list(rows(folder)) == [1, 2, 3, 4, 5]
    assert list(rows(folder, "eval_loss")) == [3, 4, 5], "one row an evaluation, also where the first run ended"
    capsys.readouterr()
    assert run(load_config(recipe, [f"save_folder={folder}", "max_duration=4ba"])) == 0
    assert "already longer than max_duration=4ba" in "".join(capsys.readouterr())
    assert (folder / "export" / "config.json").is_file() and max(rows(folder)) == 5


def test_a_non_finite_step_never_reaches_the_weights(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run_module.Loop._forward_backward

    def poisoned(self, micro_batches, counted):
        loss = original(self, micro_batches, counted)
        if self.state.step == 2:
            self.parameters[0].grad.to_local().view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(run_module.Loop, "_forward_backward", poisoned)
    stopped = [f"save_folder={tmp_path / 'stop'}", "export=false"]
    assert run(load_config(recipe, stopped)) == 3
    state = saved(tmp_path / "stop", 2)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    assert run(load_config(recipe, stopped)) == 3, "the same batch stops it again"
    assert run(load_config(recipe, [*stopped, "on_nonfinite=skip:1"])) == 0
    history = rows(tmp_path / "stop")
    assert list(history) == list(range(1, 13)) and math.isfinite(history[12]["loss"])
    assert json.loads((tmp_path / "stop" / "summary.json").read_text())["skipped_steps"] == 1


def test_a_second_run_in_one_folder_is_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(recipe, [f"save_folder={tmp_path}", "export=false"])
    seen = []

    def second(self, row):
        if self.state.step == 1:
            worker = subprocess.run(
                [sys.executable, "train.py", str(recipe), f"save_folder={tmp_path}"],
                cwd=ROOT, env=environment(), capture_output=True, text=True,
            )  # fmt: skip
            seen.append((worker.returncode, worker.stderr))

    monkeypatch.setattr(run_module.Loop, "_report", second)
    assert run(config) == 0
    assert seen[0][0] == 2 and "another run is writing" in seen[0][1] and str(tmp_path) in seen[0][1]


def test_a_linked_lock_is_neither_followed_nor_cut(recipe: Path, tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.write_text("precious")
    folder.mkdir()
    (folder / ".lock").symlink_to(elsewhere)
    with pytest.raises(InputError, match="run cannot be written"):
        run(load_config(recipe, [f"save_folder={folder}"]))
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize("error", [MemoryError(), np.empty, RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_is_not_to_be_had_is_advice(
    error: object, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        if isinstance(error, Exception):
            raise error
        np.empty(2**60, np.uint8)

    monkeypatch.setattr(run_module, "_run", fail)
    with pytest.raises(
        InputError, match=r"out of memory with .*\nwhat would help most: device_train_microbatch_size=1"
    ):
        run(load_config(recipe, [f"save_folder={tmp_path}"]))


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc/sys").exists(), reason="needs a folder that cannot be written"
)
def test_an_unwritable_save_folder_is_refused_before_the_first_step(recipe: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        run(load_config(recipe, ["save_folder=/proc/sys/run"]))


@pytest.mark.parametrize("name", ["decoupled_lionw"])
def test_lion_resumes_bit_for_bit(name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lion = [f"optimizer.name={name}", "optimizer.lr=1e-3", "export=false", "max_duration=6ba"]
    assert run(load_config(recipe, [*lion, f"save_folder={tmp_path / 'whole'}"])) == 0
    config = load_config(recipe, [*lion, f"save_folder={tmp_path / 'cut'}"])
    with monkeypatch.context() as m:
        cut(m, 3)
        assert run(config) == 143
    before = lines(tmp_path / "cut", 3)
    assert run(config) == 0
    assert lines(tmp_path / "cut", 3) == before
    assert_same_state(tmp_path / "cut", tmp_path / "whole", step=6)


@pytest.mark.parametrize("setting", ["full", "selective"])
def test_activation_checkpointing_changes_no_number(setting: str, recipe: Path, whole: Path, tmp_path: Path) -> None:
    config = load_config(recipe, [f"save_folder={tmp_path}", f"activation_checkpointing={setting}", "export=false"])
    assert run(config) == 0
    assert_same_state(tmp_path, whole)


def test_bf16_trains_with_fp32_weights(recipe: Path, whole: Path, tmp_path: Path) -> None:
    assert run(load_config(recipe, [f"save_folder={tmp_path}", "precision=amp_bf16", "export=false"])) == 0
    assert {value.dtype for value in saved(tmp_path, 12).values()} == {torch.float32}
    assert rows(tmp_path)[12]["loss"] == pytest.approx(rows(whole)[12]["loss"], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_compiled_blocks_train_alike(checkpointing: str, recipe: Path, whole: Path, tmp_path: Path) -> None:
    config = [f"save_folder={tmp_path}", "compile=true", f"activation_checkpointing={checkpointing}", "export=false"]
    assert run(load_config(recipe, [*config, "max_duration=3ba", "model.resid_pdrop=0"])) == 0
    plain = [f"save_folder={tmp_path / 'plain'}", "export=false", "max_duration=3ba", "model.resid_pdrop=0"]
    assert run(load_config(recipe, plain)) == 0
    for step, row in rows(tmp_path / "plain").items():
        assert rows(tmp_path)[step]["loss"] == pytest.approx(row["loss"], abs=1e-5)
        assert rows(tmp_path)[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_process(recipe: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command += ["train.py", str(recipe), f"save_folder={folder}", "max_duration=400ba", "save_interval=20ba"]
    command += ["eval_interval=0", "export=false"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()]
        last = int((folder / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
        before = lines(folder, last)
        os.kill(workers[-1], signal.SIGKILL)
        assert process.wait(180) == 0
    assert lines(folder, last) == before, "it began again instead of going on"
    assert list(rows(folder)) == list(range(1, 401))


def test_a_signal_during_the_last_evaluation_loses_nothing(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(recipe, [f"save_folder={tmp_path}", "export=false", "eval_interval=0", "save_interval=0"])
    evaluate = run_module.Loop.evaluate

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(self)

    with monkeypatch.context() as m:
        m.setattr(run_module.Loop, "evaluate", interrupted)
        assert run(config) == 143
    assert not rows(tmp_path, "eval_loss")
    assert_same_state(tmp_path, whole)
    for _ in range(2):
        assert run(config) == 0
        assert rows(tmp_path, "eval_loss")[12]["eval_loss"] == rows(whole, "eval_loss")[12]["eval_loss"]


def test_a_stop_that_cannot_save_says_so(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(recipe, [f"save_folder={tmp_path}", "export=false", "save_async=false", "save_interval=2ba"])
    import shutil

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        cut(m, 5)
        original = run_module.Loop.save

        def full(self):
            if self.state.step == 5:
                m.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
            original(self)

        m.setattr(run_module.Loop, "save", full)
        with pytest.raises(InputError, match="step 5, which could not be saved"):
            run(config)
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-4"
    assert run(config) == 0
    assert list(rows(tmp_path)) == list(range(1, 13))


def test_a_subset_evaluates_the_same_sequences_on_any_number_of_ranks(data: Path, recipe: Path) -> None:
    from trainer.config import validate

    batches = validate(load_config(recipe), 1).eval_data
    assert batches is not None
    whole = batches.batch(0, range(8))
    for world in (1, 2, 3):
        read = [list(batches.eval_batches(rank, world, 2, sequences=5)) for rank in range(world)]
        assert len({len(part) for part in read}) == 1
        counted = np.concatenate([ids[:valid] for step in zip(*read) for ids, valid in step])
        assert np.array_equal(counted, whole[:5])


def test_a_signal_that_arrives_twice_at_once_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []
    with run_module.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        monkeypatch.setattr(run_module, "REPEAT_S", -1.0)
        monkeypatch.setattr(run_module.os, "kill", lambda pid, number: killed.append(number))
        signals._on_signal(signal.SIGTERM, None)
    assert killed == [signal.SIGTERM]
