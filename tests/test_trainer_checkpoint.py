"""Checkpoints of one process: bit for bit, whole or absent whatever happens, the previous one used when one is bad."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from checkpoint_toys import Messages, Toy, digests, flip_bit, make, opened, save_steps, train
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor

import mpt.checkpoint
import trainer.checkpoint
from mpt.manifest import DamagedCheckpoint, list_steps
from trainer.checkpoint import Checkpointer, compare_shapes, describe, find, load_weights, verify
from trainer.errors import InputError

# One process without torch.distributed is a case of its own here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def alone():
    """torch.distributed with one process, as a run without torchrun has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def two_saved(tmp_path):
    """A folder with step-1 and step-2 of an unsharded model, and the digests of both."""
    return tmp_path, save_steps(tmp_path, *make(), [1, 2])


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("lion", [False, True])
def test_round_trip_bit_for_bit(alone, tmp_path, lion, asynchronous):
    model, optimizer = make(lion=lion)
    saved = save_steps(tmp_path, model, optimizer, [1, 3], asynchronous=asynchronous)
    other, other_optimizer = make(seed=5, lion=lion)
    with opened(tmp_path) as checkpointer:
        assert checkpointer.restore(other, other_optimizer) == {"step": 3, "tokens": 30}
    assert digests(other, other_optimizer) == saved[3]
    # And it goes on as if nothing had happened.
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    assert digests(other, other_optimizer) == digests(model, optimizer)


def test_without_torch_distributed(tmp_path):
    saved = save_steps(tmp_path, *make(), [2], asynchronous=True)
    model, optimizer = make(seed=5)
    with opened(tmp_path) as checkpointer:
        assert checkpointer.restore(model, optimizer)["step"] == 2
    assert digests(model, optimizer) == saved[2]


def test_an_optimizer_that_never_stepped_is_restored_empty(tmp_path):
    save_steps(tmp_path, *make(), [0])
    model, optimizer = make(seed=5)
    train(model, optimizer, 1)
    with opened(tmp_path) as checkpointer:
        checkpointer.restore(model, optimizer)
    assert not optimizer.state


def test_save_right_after_an_evaluation(alone, tmp_path):
    # A forward without backward leaves FSDP's root gathered: what is saved has to be the shards nevertheless.
    model, optimizer = make()
    train(model, optimizer, 1)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert not isinstance(model.wte.weight, DTensor)
    with opened(tmp_path) as checkpointer:
        checkpointer.save(1, model, optimizer, {})
    saved = digests(model, optimizer)
    other, other_optimizer = make(seed=5)
    with opened(tmp_path) as checkpointer:
        checkpointer.restore(other, other_optimizer)
    assert digests(other, other_optimizer) == saved


def test_empty_folder(tmp_path):
    with opened(tmp_path / "new" / "checkpoints") as checkpointer:
        assert checkpointer.restore(*make()) is None


def test_layout(two_saved):
    folder, _ = two_saved
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-1", "step-2"]
    assert (folder / "latest").read_text() == "step-2\n"
    assert sorted(p.name for p in (folder / "step-2").iterdir()) == [".metadata", "__0_0.distcp", "manifest.json"]
    manifest = json.loads((folder / "step-2" / "manifest.json").read_text())
    assert manifest["step"] == 2 and manifest["world_size"] == 1 and manifest["torch"] == torch.__version__
    assert manifest["fingerprint"] == {"model": {"d_model": 8, "betas": [0.9, 0.95]}, "seed": 17}
    assert manifest["model"] == {"d_model": 8, "vocab_size": 11}
    assert manifest["state"] == {"step": 2, "tokens": 20}
    data = (folder / "step-2" / "__0_0.distcp").read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["files"]["__0_0.distcp"] == entry
    assert sorted(manifest["files"]) == [".metadata", "__0_0.distcp"]


def test_tied_weights_are_stored_once(two_saved):
    shapes = describe(two_saved[0])
    assert shapes["wte.weight"] == (11, 8) and "lm_head.weight" not in shapes
    assert shapes["seen"] == (3,)
    assert len(shapes) == len(Toy().state_dict()) - 1


@pytest.mark.parametrize("keep, left", [(-1, [5, 4, 2, 1]), (2, [5, 4]), (1, [5]), (0, [5])])
def test_prune(tmp_path, keep, left):
    save_steps(tmp_path, *make(), [1, 2, 4, 5], keep=keep)
    assert [step for step, _ in list_steps(tmp_path)] == left
    assert verify(tmp_path).step == 5
    assert not list(tmp_path.glob("*.tmp"))


def test_stale_temporary_folders_are_removed(two_saved):
    folder, _ = two_saved
    shutil.copytree(folder / "step-2", folder / "step-3.tmp")
    (folder / "step-1.old.tmp").mkdir()
    (folder / "step-1.damaged.old.tmp").mkdir()
    (folder / "latest.tmp").write_text("step-")
    foreign = folder / "notes.tmp", folder / "step-x.tmp"
    for path in foreign:
        path.write_text("someone else's")
    (folder / "step-9.tmp").symlink_to(folder / "step-1")
    with opened(folder):
        left = sorted(p.name for p in folder.iterdir())
        assert left == ["latest", "notes.tmp", "step-1", "step-2", "step-x.tmp"]
    assert verify(folder / "step-1").step == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/checkpoints cannot be written .* choose another save_folder"):
        Checkpointer(tmp_path / "file" / "checkpoints", keep=1, fingerprint={}, asynchronous=False, on_error="stop")


DAMAGE = {
    "data bit": (lambda f: flip_bit(f / "__0_0.distcp"), r"__0_0\.distcp is altered"),
    "index bit": (lambda f: flip_bit(f / ".metadata"), r"\.metadata is altered"),
    "manifest bit": (lambda f: flip_bit(f / "manifest.json"), r"manifest\.json is altered"),
    "manifest number": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace('"seed": 17', '"seed": 18')
        ),
        r"manifest\.json is altered",
    ),
    "truncated data": (lambda f: os.truncate(f / "__0_0.distcp", 100), r"__0_0\.distcp has 100 bytes instead of"),
    "truncated manifest": (lambda f: os.truncate(f / "manifest.json", 100), r"manifest\.json is altered or truncated"),
    "empty manifest": (lambda f: os.truncate(f / "manifest.json", 0), r"manifest\.json is altered or truncated"),
    "no data": (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    "no index": (lambda f: (f / ".metadata").unlink(), r"\.metadata is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_used(two_saved, kind):
    folder, saved = two_saved
    damage, message = DAMAGE[kind]
    damage(folder / "step-2")
    with pytest.raises(DamagedCheckpoint, match=message):
        load_weights(folder / "step-2", make()[0])
    model, optimizer = make(seed=5)
    said = Messages()
    with opened(folder, say=said, keep=2) as checkpointer:
        assert checkpointer.restore(model, optimizer)["step"] == 1
        assert digests(model, optimizer) == saved[1]
        (text,) = said
        assert "step-2 is damaged" in text and "step-1 is used" in text
        assert (folder / "step-2.damaged").is_dir()
        # The run goes on, and writes that step anew.
        train(model, optimizer, 1)
        checkpointer.save(2, model, optimizer, {"step": 2})
        assert digests(model, optimizer) == saved[2]
    assert verify(folder).step == 2
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-1", "step-2"]


def test_a_checkpoint_under_another_steps_name_is_not_trusted(two_saved):
    folder, saved = two_saved
    (folder / "step-2").rename(folder / "step-9")
    model, optimizer = make(seed=5)
    load_weights(folder / "step-9", model)  # whose name says nothing of its place in a run
    said = Messages()
    with opened(folder, say=said) as checkpointer:
        assert checkpointer.restore(model, optimizer)["step"] == 1
    assert digests(model, optimizer) == saved[1]
    assert "step-9 is renamed: it holds step 2" in said and (folder / "step-9.damaged").is_dir()


def test_swapped_checkpoints_are_named_and_left(two_saved):
    folder, _ = two_saved
    (folder / "step-1").rename(folder / "aside")
    (folder / "step-2").rename(folder / "step-1")
    (folder / "aside").rename(folder / "step-2")
    with opened(folder) as checkpointer:
        with pytest.raises(
            InputError, match=r"(?s)step-2 is renamed: it holds step 1; name it step-1.*step-1 is renam"
        ):
            checkpointer.restore(*make())
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-1", "step-2"]


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(two_saved):
    folder, _ = two_saved
    flip_bit(folder / "step-1" / "__0_0.distcp")
    (folder / "step-2" / "manifest.json").unlink()
    before = sorted(p.name for p in folder.iterdir())
    with opened(folder) as checkpointer:
        with pytest.raises(InputError, match=r"(?s)is usable.*step-2/manifest.json is missing.*step-1/__0_0.*repair"):
            checkpointer.restore(*make())
    assert sorted(p.name for p in folder.iterdir()) == before


def test_other_fingerprint_lists_old_and_new(two_saved):
    folder, _ = two_saved
    model, optimizer = make(seed=5)
    before = digests(model, optimizer)
    changed = {"model": {"d_model": 8, "betas": (0.9, 0.99), "no_bias": True}, "seed": 18}
    with opened(folder, fingerprint=changed) as checkpointer:
        with pytest.raises(InputError) as error:
            checkpointer.restore(model, optimizer)
    lines = str(error.value).splitlines()
    assert "step-2 belongs to another run" in lines[0]
    assert lines[1:4] == [
        "  model.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "  seed: 17 -> 18",
        "  model.no_bias: (absent) -> True",
    ]
    assert "load_path" in lines[4]
    assert digests(model, optimizer) == before


def test_a_key_that_an_older_version_lacked_has_its_default(two_saved):
    folder, _ = two_saved
    newer = {"model": {"d_model": 8, "betas": (0.9, 0.95), "no_bias": False}, "seed": 17}
    defaults = {"model": {"d_model": 4, "no_bias": False}, "lora": {"rank": 16}}
    with opened(folder, fingerprint=newer, defaults=defaults) as checkpointer:
        assert checkpointer.restore(*make())["step"] == 2
    for key, value, told in (
        ("model", newer["model"] | {"no_bias": True}, "model.no_bias: False -> True"),
        ("lora", {"rank": 16}, r"lora.rank: \(absent\) -> 16"),  # a whole section is no new key
    ):
        with opened(folder, fingerprint=newer | {key: value}, defaults=defaults) as checkpointer:
            with pytest.raises(InputError, match=rf"run's\):\n  {told}\n"):
                checkpointer.restore(*make())


def test_good_checkpoint_of_the_same_step_is_left_alone(two_saved):
    folder, _ = two_saved
    before = (folder / "step-2" / "__0_0.distcp").stat().st_mtime_ns
    model, optimizer = make()
    with opened(folder) as checkpointer:
        checkpointer.save(2, model, optimizer, {})
        checkpointer.save(2, model, optimizer, {})
    assert (folder / "step-2" / "__0_0.distcp").stat().st_mtime_ns == before


def test_damaged_checkpoint_of_the_same_step_is_replaced(two_saved):
    folder, _ = two_saved
    flip_bit(folder / "step-2" / "__0_0.distcp")
    said = Messages()
    model, optimizer = make()
    with opened(folder, say=said) as checkpointer:
        checkpointer.save(2, model, optimizer, {"step": 2})
    assert "step-2 is damaged" in said and verify(folder / "step-2").step == 2
    assert (folder / "step-2.damaged").is_dir()


def test_another_runs_checkpoint_of_the_same_step_is_not_overwritten(two_saved):
    folder, _ = two_saved
    with opened(folder, fingerprint={"seed": 1}) as checkpointer:
        with pytest.raises(InputError, match=r"step-2 belongs to another run"):
            checkpointer.save(2, *make(), {})
    assert verify(folder).fingerprint["seed"] == 17


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("stage", ["write_data", "finish", "manifest", "rename"])
def test_failed_write_leaves_the_previous_checkpoint(two_saved, monkeypatch, stage, asynchronous):
    folder, _ = two_saved

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if stage == "manifest":
        monkeypatch.setattr(trainer.checkpoint, "write_manifest", full)
    elif stage == "rename":
        monkeypatch.setattr(Path, "rename", full)
    else:
        monkeypatch.setattr(dcp.FileSystemWriter, stage, full)
    model, optimizer = make()
    said = Messages()
    with opened(folder, on_error="continue", asynchronous=asynchronous, say=said) as checkpointer:
        checkpointer.save(3, model, optimizer, {})
        checkpointer.wait()
        assert not checkpointer.failed
    (text,) = said
    assert "step 3 could not be saved" in text and "No space left on device" in text and "training goes on" in text
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-1", "step-2"]
    assert verify(folder).step == 2

    with opened(folder, on_error="stop", asynchronous=asynchronous) as checkpointer:
        with pytest.raises(InputError, match=r"step 3 could not be saved: No space left on device.*on_save_error"):
            checkpointer.save(3, model, optimizer, {})
            for _ in range(1000):
                if checkpointer.failed:
                    break
                time.sleep(0.01)
            checkpointer.wait()
        assert not checkpointer.failed
    monkeypatch.undo()
    with opened(folder) as checkpointer:
        checkpointer.save(3, model, optimizer, {})
        assert checkpointer.holds(3)
    assert verify(folder).step == 3


def test_disk_too_small_is_seen_before_writing(two_saved, monkeypatch):
    folder, _ = two_saved
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=10**6, free=1000))
    said = Messages()
    with opened(folder, on_error="continue", say=said) as checkpointer:
        checkpointer.save(3, *make(), {})
        assert not checkpointer.holds(3)
    assert "0.0 MB free" in said and not list(folder.glob("*.tmp"))


def test_estimate_of_the_size_covers_the_checkpoint(two_saved, monkeypatch):
    folder, _ = two_saved
    size = sum(p.stat().st_size for p in (folder / "step-2").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    model, optimizer = make()
    train(model, optimizer, 1)
    with opened(folder) as checkpointer:
        with pytest.raises(InputError, match="MB free"):
            checkpointer.save(3, model, optimizer, {})


def test_asynchronous_save_holds_the_values_of_its_moment(tmp_path, monkeypatch):
    written = threading.Event()
    original = dcp.FileSystemWriter.write_data

    def later(self, plan, planner):
        assert written.wait(60)
        return original(self, plan, planner)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", later)
    model, optimizer = make()
    train(model, optimizer, 1)
    saved = digests(model, optimizer)
    with opened(tmp_path, asynchronous=True) as checkpointer:
        checkpointer.save(1, model, optimizer, {})
        train(model, optimizer, 3)
        assert digests(model, optimizer) != saved and not list_steps(tmp_path)
        written.set()
    other, other_optimizer = make(seed=5)
    with opened(tmp_path) as checkpointer:
        checkpointer.restore(other, other_optimizer)
    assert digests(other, other_optimizer) == saved


def killed_at(folder, module, name):
    """In a forked process: save step 3, dying without notice where `name` is first called."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    setattr(module, name, die)
    with opened(folder, asynchronous=True) as checkpointer:
        checkpointer.save(3, *make(seed=3), {"step": 3})


@pytest.mark.parametrize(
    "module, name, step",
    [
        (dcp.FileSystemWriter, "finish", 2),
        (trainer.checkpoint, "file_entry", 2),
        (trainer.checkpoint, "write_manifest", 2),
        (Path, "rename", 2),
        (trainer.checkpoint, "write_text", 3),
        (Checkpointer, "_prune", 3),
    ],
)
def test_killed_while_saving(two_saved, module, name, step):
    folder, saved = two_saved
    process = mp.get_context("fork").Process(target=killed_at, args=(folder, module, name))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    model, optimizer = make(seed=5)
    with opened(folder) as checkpointer:
        assert checkpointer.restore(model, optimizer)["step"] == step
    if step == 2:
        assert digests(model, optimizer) == saved[2]
    assert not list(folder.glob("*.tmp"))


def test_state_that_cannot_be_saved_is_refused_before_writing(tmp_path):
    model, optimizer = make()
    with opened(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.save(1, model, optimizer, {"object": object()})
        train(model, optimizer, 1)
        optimizer.state[model.gate.bias]["step"] = 1
        with pytest.raises(ValueError, match=r"optim.gate.bias.step is a int"):
            checkpointer.save(1, model, optimizer, {})


def test_find_and_load_weights(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    saved = save_steps(folder, *make(), [1, 2])
    for path, step in [(folder / "step-1", 1), (tmp_path / "run", 2), (str(folder), 2)]:
        assert find(path) == folder / f"step-{step}"
        model, optimizer = make(seed=5)
        load_weights(path, model)
        found = digests(model, optimizer)
        assert found == {name: saved[step][name] for name in found} and not optimizer.state
    (folder / "latest").write_text("../../elsewhere")
    assert find(folder) == folder / "step-2"
    (folder / "latest").write_text("step-1\n")
    assert find(folder) == folder / "step-1"
    with pytest.raises(InputError, match=r"nothing does not exist; give a model's folder"):
        load_weights(tmp_path / "nothing", model)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SafetensorError("header too large")])
def test_a_hugging_face_folder_that_cannot_be_read(tmp_path, monkeypatch, error):
    (tmp_path / "model.safetensors").write_bytes(b"")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(mpt.checkpoint, "open_checkpoint", fail)
    for read in (describe, lambda path: load_weights(path, make()[0])):
        with pytest.raises(InputError, match=rf"{tmp_path} cannot be read: .*(Input|header too)"):
            read(tmp_path)


def test_shapes_that_differ_are_shown_in_a_table(two_saved):
    folder, _ = two_saved
    model, optimizer = make(vocab=12)
    model.extra = nn.Linear(2, 3, bias=False)
    for load in (lambda: load_weights(folder, model), lambda: opened_restore(folder, model, optimizer)):
        with pytest.raises(InputError) as error:
            load()
        lines = str(error.value).splitlines()
        assert "2 of 15 tensors differ" in lines[0]
        assert lines[1].split() == ["name", "this", "model", "checkpoint"]
        assert lines[2].split(maxsplit=1) == ["wte.weight", "(12, 8)     (11, 8)"]
        assert lines[3].split(maxsplit=1) == ["extra.weight", "(3, 2)      missing"]
    assert compare_shapes(folder, describe(folder), describe(folder)) is None


def opened_restore(folder, model, optimizer):
    with opened(folder) as checkpointer:
        checkpointer.restore(model, optimizer)
