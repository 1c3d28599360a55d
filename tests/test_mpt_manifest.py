"""What is refused before anything of a checkpoint is used: altered, incomplete and crafted folders."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mpt.manifest import (
    DamagedCheckpoint,
    check_files,
    file_entry,
    list_steps,
    read_index,
    read_manifest,
    write_manifest,
    write_text,
)
from trainer.checkpoint import Checkpointer, describe, find, load_weights, verify
from trainer.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def step(tmp_path):
    """A good checkpoint folder, of a small layer and its AdamW after a step."""
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(5)).sum().backward()
    optimizer.step()
    checkpointer = Checkpointer(
        tmp_path, keep=1, fingerprint={"seed": 17}, asynchronous=False, on_error="stop", fsync=False
    )
    checkpointer.save(2, model, optimizer, {"step": 2})
    checkpointer.close()
    return tmp_path / "step-2"


def flip_bit(path, where):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1 << 4
    path.write_bytes(data)


def rewrite_manifest(folder):
    """What an attacker would do after changing a file: make sizes and hashes right again."""
    manifest = read_manifest(folder)
    manifest.files.update({name: file_entry(folder / name) for name in manifest.files})
    write_manifest(folder, manifest, fsync=False)


def test_good_checkpoint(step):
    assert verify(step) == verify(step.parent) == read_manifest(step)
    assert describe(step) == {"weight": (3, 5), "bias": (3,)}


def test_no_flipped_bit_passes(step, generator):
    for name in (".metadata", "__0_0.distcp", "manifest.json"):
        original = (step / name).read_bytes()
        for where in torch.rand(25, generator=generator).tolist():
            flip_bit(step / name, where)
            with pytest.raises(DamagedCheckpoint, match=name):
                verify(step)
            (step / name).write_bytes(original)
    verify(step)


def test_altered_manifest(step):
    path = step / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 17', '"seed": 18'))
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is altered: it does not match its own hash"):
        verify(step)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, "\xff"])
def test_something_else_for_a_manifest(step, text):
    (step / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is altered"):
        verify(step)


def test_a_manifest_of_something_else(step):
    (step / "manifest.json").write_text('{"format": "mpt-token-shards"}')
    with pytest.raises(DamagedCheckpoint, match=r"not a checkpoint's: its format is 'mpt-token-shards'"):
        verify(step)


@pytest.mark.parametrize("files", [["a"], {"a": 1}, {"a": {"bytes": 1}}, {}])
def test_manifest_that_lists_no_files(step, files):
    manifest = read_manifest(step)
    object.__setattr__(manifest, "files", files)
    write_manifest(step, manifest, fsync=False)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json (lacks fields|does not list)"):
        verify(step)


def test_manifest_of_a_newer_format(step, monkeypatch):
    manifest = read_manifest(step)
    monkeypatch.setattr("mpt.manifest.VERSION", 2)
    write_manifest(step, manifest, fsync=False)
    monkeypatch.undo()
    with pytest.raises(DamagedCheckpoint, match="format version 2; this program reads 1"):
        verify(step)


def test_every_file_is_hashed_by_some_rank(step):
    manifest = read_manifest(step)
    for name in manifest.files:
        original = (step / name).read_bytes()
        flip_bit(step / name, 0.5)
        refused = 0
        for part in range(2):
            try:
                check_files(step, manifest, part=part, parts=2)
            except DamagedCheckpoint:
                refused += 1
        assert refused == 1
        (step / name).write_bytes(original)


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_malicious_index_is_refused(step, tmp_path):
    trap = tmp_path / "trap"
    (step / ".metadata").write_bytes(pickle.dumps(Exploit(str(trap))))
    rewrite_manifest(step)
    for read in (verify, describe, lambda f: load_weights(f, nn.Linear(5, 3))):
        with pytest.raises(DamagedCheckpoint, match=r"\.metadata is refused: it asks for posix\.mkdir"):
            read(step)
    assert not trap.exists()
    # It would have worked where nobody looks first.
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load({"weight": torch.zeros(1)}, checkpoint_id=step)
    assert trap.exists()


def leave_the_folder(index):
    for info in index.storage_data.values():
        info.relative_path = "../step-1/__0_0.distcp"


def hide_a_pickle(index):
    index.state_dict_metadata["model.weight"] = BytesStorageMetadata()


def name_a_transform(index):
    for info in index.storage_data.values():
        info.transform_descriptors = ["zstd"]


def no_storage(index):
    index.storage_data = None


@pytest.mark.parametrize("change", [leave_the_folder, hide_a_pickle, name_a_transform, no_storage])
def test_crafted_index_is_refused(step, change):
    index = read_index(step, read_manifest(step))
    change(index)
    (step / ".metadata").write_bytes(pickle.dumps(index))
    rewrite_manifest(step)
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is refused"):
        verify(step)


def test_crafted_shape_of_optimizer_state_is_refused(step):
    index = read_index(step, read_manifest(step))
    index.state_dict_metadata["optim.weight.exp_avg"].size = torch.Size([10**15])
    (step / ".metadata").write_bytes(pickle.dumps(index))
    rewrite_manifest(step)
    model = nn.Linear(5, 3)
    checkpointer = Checkpointer(
        step.parent, keep=1, fingerprint={"seed": 17}, asynchronous=False, on_error="stop", fsync=False
    )
    with pytest.raises(
        InputError, match=r"optim.weight.exp_avg has shape \(1000000000000000,\), its parameter \(3, 5\)"
    ):
        checkpointer.restore(model, torch.optim.AdamW(model.parameters()))


def test_folder_without_our_manifest_is_refused(tmp_path):
    dcp.save({"model.weight": torch.zeros(3)}, checkpoint_id=tmp_path / "step-7")
    for path in (tmp_path / "step-7", tmp_path):
        with pytest.raises(DamagedCheckpoint, match=r"manifest.json is missing"):
            load_weights(path, nn.Linear(5, 3))


def test_manifest_that_names_files_elsewhere_is_refused(step):
    manifest = read_manifest(step)
    manifest.files["../other/.metadata"] = manifest.files[".metadata"]
    write_manifest(step, manifest, fsync=False)
    with pytest.raises(DamagedCheckpoint, match="outside its folder"):
        verify(step)


def test_a_link_in_the_way_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (tmp_path / "latest.tmp").symlink_to(precious)
    write_text(tmp_path / "latest", "step-1\n", fsync=False)
    assert precious.read_text() == "years of work" and (tmp_path / "latest").read_text() == "step-1\n"
    assert not (tmp_path / "latest").is_symlink()


def test_list_and_find(tmp_path):
    for name in ("step-2", "step-10", "step-10.damaged", "step-11.tmp", "step-x", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-12").write_text("a file")
    folder = tmp_path / "checkpoints"
    assert list_steps(folder) == [(10, folder / "step-10"), (2, folder / "step-2")]
    assert find(tmp_path) == find(folder) == folder / "step-10"
    (folder / "latest").write_text("step-2\n")
    assert find(str(tmp_path)) == folder / "step-2"
    for pointless in ("../../elsewhere", "step-11.tmp", "step-12", ""):
        (folder / "latest").write_text(pointless)
        assert find(tmp_path) == folder / "step-10"
    for nothing in (tmp_path / "nothing", folder / "other"):
        with pytest.raises(InputError, match=r"no checkpoint at .* expected a step-N folder"):
            find(nothing)
    assert list_steps(Path("/nowhere")) == []
