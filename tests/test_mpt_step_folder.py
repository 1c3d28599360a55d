"""The weights of a training run's checkpoint, without the trainer that wrote it."""

import dataclasses
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import IDS, TOKENIZER, published, same
from torch.distributed.checkpoint.metadata import MetadataIndex

from mpt import MptForCausalLM, MptModel
from mpt.checkpoint import open_checkpoint
from mpt.manifest import DamagedCheckpoint, file_entry, read_index, read_manifest, write_manifest
from trainer.checkpoint import Checkpointer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(run: Path, model: MptForCausalLM, steps: tuple[int, ...] = (2,)) -> Path:
    """A run's folder with checkpoints, optimizer state in them; returns the newest."""
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(
        run / "checkpoints", keep=-1, fingerprint={}, asynchronous=False, on_error="stop", fsync=False
    )
    for step in steps:
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.save(step, model, optimizer, {"step": step})
    checkpointer.close()
    return run / "checkpoints" / f"step-{steps[-1]}"


def change_index(step: Path, change) -> None:
    """Rewrite the index, and the manifest to fit, as an attacker would."""
    manifest = read_manifest(step)
    index = read_index(step, manifest)
    change(index)
    (step / ".metadata").write_bytes(pickle.dumps(index))
    manifest.files[".metadata"] = file_entry(step / ".metadata")
    write_manifest(step, manifest, fsync=False)


def test_a_run_loads_like_any_other(tmp_path: Path) -> None:
    trained = published(no_bias=False).float()
    step = save(tmp_path / "run", trained, (2, 5))
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", step):
        loaded = MptForCausalLM.from_pretrained(path)
        assert same(loaded, trained) and loaded.config == trained.config
    assert same(MptModel.from_pretrained(step), trained.transformer)
    older = MptForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-2")
    assert not same(older, trained)
    half = MptForCausalLM.from_pretrained(step, dtype=torch.bfloat16)
    assert torch.equal(half.transformer.wte.weight, trained.transformer.wte.weight.bfloat16())
    (tmp_path / "run" / "export").mkdir()
    (tmp_path / "run" / "export" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    assert open_checkpoint(tmp_path / "run").companions.keys() == {"tokenizer.json"}


def test_rows(tmp_path: Path) -> None:
    """Any rows, also across the parts that ranks wrote."""
    trained = published().float()
    step = save(tmp_path / "run", trained)
    wte = trained.transformer.wte.weight

    def split(index) -> None:
        # As two ranks would have written it: the second part is the first file's tensor, cut out of it.
        name = "model.transformer.wte.weight"
        entry = index.state_dict_metadata[name]
        whole = entry.chunks[0]
        parts = [
            dataclasses.replace(whole, offsets=torch.Size((start, 0)), sizes=torch.Size((stop - start, 64)))
            for start, stop in ((60, 97), (0, 60))
        ]
        place = index.storage_data.pop(MetadataIndex(name, whole.offsets))
        with (step / place.relative_path).open("ab") as file:
            for part in parts:
                start, offset = part.offsets[0], file.tell()
                torch.save(wte[start : start + part.sizes[0]].detach().clone(), file)
                index.storage_data[MetadataIndex(name, part.offsets)] = dataclasses.replace(
                    place, offset=offset, length=file.tell() - offset
                )
        entry.chunks = parts

    change_index(step, split)
    manifest = read_manifest(step)
    manifest.files.update({name: file_entry(step / name) for name in manifest.files})
    write_manifest(step, manifest, fsync=False)
    stored = open_checkpoint(step, check_hashes=True).tensors["transformer.wte.weight"]
    for start, stop in ((0, 97), (0, 1), (59, 61), (60, 97), (96, 97), (97, 97), (90, 200)):
        assert torch.equal(stored.rows(start, stop), wte[start:stop]), (start, stop)
    assert same(MptForCausalLM.from_pretrained(step), trained)


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    step = save(tmp_path / "run", published().float())
    data = bytearray((step / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (step / "__0_0.distcp").write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp is altered"):
        MptForCausalLM.from_pretrained(step)


WTE = "model.transformer.wte.weight"


def _drop(index) -> None:
    index.storage_data = {k: v for k, v in index.storage_data.items() if k.fqn != WTE}


def _hole(index) -> None:
    chunk = index.state_dict_metadata[WTE].chunks[0]
    chunk.sizes = torch.Size((96, 64))


def _columns(index) -> None:
    chunk = index.state_dict_metadata[WTE].chunks[0]
    chunk.sizes = torch.Size((97, 32))


def _place(**changes):
    def change(index) -> None:
        key = next(k for k in index.storage_data if k.fqn == WTE)
        index.storage_data[key] = dataclasses.replace(index.storage_data[key], **changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, f"does not say where {WTE} is"),
        (_hole, f"does not hold every row of {WTE} once"),
        (_columns, f"does not say where {WTE} is"),
        (_place(length=10**15), f"does not say where {WTE} is"),
        (_place(offset=-5), f"does not say where {WTE} is"),
        (_place(offset=17), "is truncated, or no file of torch.save's|does not hold what the index says"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change, message: str) -> None:
    step = save(tmp_path / "run", published().float())
    change_index(step, change)
    with pytest.raises(ValueError, match=message):
        MptForCausalLM.from_pretrained(step)


def test_a_part_that_is_code(tmp_path: Path) -> None:
    """Hashes prove nothing about who made a folder: what is in the data files is unpickled as any stranger's."""
    step = save(tmp_path / "run", published().float())
    data = step / "__0_0.distcp"

    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit",)

    offset = data.stat().st_size
    with data.open("ab") as file:
        torch.save(Evil(), file)
    assert zipfile.is_zipfile(data)
    change_index(step, _place(offset=offset, length=data.stat().st_size - offset))
    manifest = read_manifest(step)
    manifest.files[data.name] = file_entry(data)
    write_manifest(step, manifest, fsync=False)
    with pytest.raises(ValueError, match=r"is refused: it asks for builtins\.exec"):
        MptForCausalLM.from_pretrained(step)
