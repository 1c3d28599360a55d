"""Files that lie, are cut off, or ask for code: each is one clear error, and nothing of them is run or allocated."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import published, same, write_composer
from safetensors.torch import load_file, save_file

from mpt import MptConfig, MptForCausalLM
from mpt.checkpoint import load_weights, open_checkpoint
from mpt.tensor_files import load_archive, read_bin

SHAPE = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 32}


def model(**extra) -> MptForCausalLM:
    return MptForCausalLM(MptConfig(**(SHAPE | extra))).eval()


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Calls(os.mkdir, "pwned"), "posix.mkdir"),
        (Calls(os.system, "touch pwned"), "posix.system"),
        (Calls(subprocess.Popen, ["touch", "pwned"]), "subprocess.Popen"),
        (Calls(eval, "open('pwned', 'w')"), "builtins.eval"),
        (Calls(bytearray, 10**15), "builtins.bytearray"),
        (Calls(torch.FloatTensor, 10**15), "torch.FloatTensor"),
        (Calls(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Calls, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"transformer.wte.weight": call}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin is refused: it asks for .*{name}, which no file"):
        load_weights(model(), tmp_path)
    (tmp_path / "run").mkdir()
    path = write_composer(tmp_path / "run", published(), callbacks={"Evil": call})
    with pytest.raises(ValueError, match=rf"rank0\.pt is refused: it asks for {name}, which no file of a training's"):
        open_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


def test_objects_of_other_packages_are_neither_imported_nor_called(tmp_path: Path) -> None:
    """A metric in a training's state may name any package: it gets a stand-in, even where that could be imported."""
    called = []
    module = sys.modules["somebodys_metrics"] = types.ModuleType("somebodys_metrics")
    module.run = lambda *arguments: called.append(arguments)
    module.run.__module__, module.run.__qualname__ = "somebodys_metrics", "run"
    trained = published()
    try:
        path = write_composer(tmp_path, trained, eval_metrics={"loss": Calls(module.run, "now")})
        assert same(MptForCausalLM.from_pretrained(path), trained)
    finally:
        del sys.modules["somebodys_metrics"]
    assert not called
    with pytest.raises(ValueError, match=r"is refused: it asks for .*, which no file of tensors needs"):
        read_bin(path)


def _archive(path: Path, change=None, **options) -> None:
    """A torch.save file of {"a": arange(10), "b": ones(3)}, written again entry by entry."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(10.0), "b": torch.ones(3)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", **options) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if change and entry.filename.endswith("/data.pkl") else data)


def _numel(data: bytes) -> bytes:
    """The pickle with 2,000,000,000 in the place of 10, as number of elements and as shape."""
    assert data.count(b"K\n") == 2
    return data.replace(b"K\n", b"J" + (2 * 10**9).to_bytes(4, "little"))


def test_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    _archive(path)
    assert {name: stored.shape for name, stored in read_bin(path).items()} == {"a": (10,), "b": (3,)}
    _archive(path, _numel)
    with pytest.raises(ValueError, match=r"a\.bin (is damaged|is not a plain dictionary)"):
        read_bin(path)
    _archive(path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is refused: it is compressed"):
        read_bin(path)
    _archive(path, lambda data: data[:20])
    with pytest.raises(ValueError, match="is damaged: its pickle does not parse"):
        read_bin(path)
    _archive(path)
    data = path.read_bytes()
    for keep in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(ValueError, match=r"is truncated, or no file of torch\.save's"):
            read_bin(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"no file of torch\.save's"):
        read_bin(path)


def test_an_entry_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    _archive(path)
    data = bytearray(path.read_bytes())
    where = data.rindex(b"PK\x01\x02")  # of the last entry in the directory: compressed size, size
    data[where + 20 : where + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its parts are together larger than the file"):
        read_bin(path)


def test_one_number_is_no_large_tensor(tmp_path: Path) -> None:
    """A stride of 0 gives a file of some bytes any shape."""
    torch.save({"a": torch.ones(1).expand(10**9, 64)}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="is not a plain dictionary of tensors"):
        read_bin(tmp_path / "a.bin")


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(ValueError, match=r"model\.safetensors has become shorter while it was read"):
        load_weights(model(), source)


def test_an_archive_of_another_make(tmp_path: Path) -> None:
    for names, message in (
        (["a/data.pkl", "b/data.pkl"], "torch.save puts one data.pkl into a file, and this holds 2"),
        (["a/b/data.pkl"], "this holds 0"),
        (["a/data.pkl", "a/data/0", "a/data/0"], "it holds 'a/data/0' twice"),
    ):
        with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the name that comes twice
            for name in names:
                archive.writestr(name, b"x")
        with pytest.raises(ValueError, match=message):
            read_bin(tmp_path / "a.bin")


def test_a_training_state_is_no_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in ({"state": {}}, {"a": torch.ones(1)}, [1], {"state": {"model": [1]}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"is no Composer checkpoint: it holds no \['state'\]\['model'\]"):
            open_checkpoint(path)
    torch.save({"state": {"model": {"transformer.wte.weight": torch.ones(1)}}}, path)
    with pytest.raises(ValueError, match=r"do not all begin with 'model\.'"):
        open_checkpoint(path)
    torch.save({"state": {"model": {"model.a": 3}}}, path)
    with pytest.raises(ValueError, match="is not a plain dictionary of tensors"):
        open_checkpoint(path)
    assert load_archive(path)["state"]["model"] == {"model.a": 3}


def _index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values["weight_map"])
    path.write_text(json.dumps(values))


def _move(folder: Path, name: str) -> None:
    _index(folder, lambda m: m.update({k: name for k, v in m.items() if v.startswith("model-00001")}))


def _duplicate_across(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)


def _duplicate_in_header(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    name = next(k for k in json.loads(header) if k != "__metadata__")
    entry = json.dumps({name: json.loads(header)[name]})[1:-1]
    header = (header[:-1] + "," + entry + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def _truncate(folder: Path, keep: int) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:keep])


def _header(folder: Path, change) -> None:
    """Rewrites the header of the first shard, a mapping from names to their entries."""
    path = sorted(folder.glob("*.safetensors"))[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + length])
    values.pop("__metadata__")
    text = change(values)
    header = text if isinstance(text, bytes) else json.dumps(values).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def _entry(folder: Path, **changes) -> None:
    _header(folder, lambda h: h[min(h)].update(changes))


def _overlap(folder: Path) -> None:
    def change(header):
        first, second = sorted(header.values(), key=lambda entry: entry["data_offsets"])[:2]
        second |= {key: first[key] for key in ("dtype", "shape", "data_offsets")}

    _header(folder, change)


def _folder(folder: Path, name: str) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / name).mkdir()


def _bin(folder: Path, change) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(change(dict(model().state_dict())), folder / "pytorch_model.bin")


def _duplicate_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    text = path.read_text()
    line = next(line for line in text.splitlines() if "wte.weight" in line).rstrip(",")
    path.write_text(text.replace('"weight_map": {', '"weight_map": {\n' + line + ",", 1))


HOSTILE = {
    "parent": (
        lambda f: _move(f, "../secret.safetensors"),
        r"names the file '\.\./secret\.safetensors'; shards must be plain",
    ),
    "absolute": (lambda f: _move(f, "/etc/passwd"), "names the file '/etc/passwd'"),
    "dots": (lambda f: _move(f, ".."), r"names the file '\.\.'"),
    "nothing": (lambda f: _move(f, ""), "names the file ''"),
    "backslash": (lambda f: _move(f, "..\\secret"), "shards must be plain file names"),
    "absent file": (
        lambda f: _move(f, "other.safetensors"),
        r"names the file other\.safetensors, which does not exist",
    ),
    "not a name": (lambda f: _index(f, lambda m: m.update(a=3)), "has no weight_map"),
    "name in no file": (
        lambda f: _index(f, lambda m: m.update({"x.weight": min(m.values())})),
        r"puts x\.weight into model-00001.*, which does not hold it",
    ),
    "name in two files": (_duplicate_across, "a name must be in one file"),
    "name twice in a header": (_duplicate_in_header, "names 'transformer.* twice"),
    "name twice in the index": (_duplicate_in_index, r"names 'transformer\.wte\.weight' twice"),
    "truncated": (lambda f: _truncate(f, 2000), "is truncated or damaged: 2000 bytes"),
    "truncated header": (lambda f: _truncate(f, 50), "is truncated or no safetensors file"),
    "empty": (lambda f: _truncate(f, 0), "is truncated or no safetensors file"),
    "negative offsets": (lambda f: _entry(f, data_offsets=[-8, 0]), "does not describe transformer.* as a tensor"),
    "one offset": (lambda f: _entry(f, data_offsets=[8]), "does not describe transformer.* as a tensor"),
    "offsets backwards": (lambda f: _entry(f, data_offsets=[4, 0]), "is damaged: its header puts"),
    "negative shape": (lambda f: _entry(f, shape=[-2, -3]), "does not describe transformer.* as a tensor"),
    "fractional shape": (lambda f: _entry(f, shape=[1.5]), "does not describe transformer.* as a tensor"),
    "other shape": (lambda f: _entry(f, shape=[3, 5]), r"puts transformer.* \(F32, \[3, 5\]\) at bytes"),
    "other dtype": (lambda f: _entry(f, dtype="F16"), r"puts transformer.* \(F16, "),
    "dtype of another type": (lambda f: _entry(f, dtype=["F32"]), "does not describe"),
    "overlap": (_overlap, "is damaged: its header puts"),
    "entry of another type": (lambda f: _header(f, lambda h: h.update({min(h): 3})), "does not describe"),
    "5,000 digits": (
        lambda f: _header(f, lambda h: b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"),
        r"model-00001.* is damaged: its JSON does not parse \(Exceeds",
    ),
    "long file name": (lambda f: _move(f, "x" * 5000), r"names the file x{200}\.\.\., which does not exist"),
    "half a surrogate pair": (lambda f: _move(f, "\ud800"), "which does not exist"),
    "weights are a folder": (lambda f: _folder(f, "model.safetensors"), "model.safetensors cannot be read"),
    "index is a folder": (lambda f: _folder(f, "model.safetensors.index.json"), "index.json cannot be read"),
    "meta tensors": (
        lambda f: _bin(f, lambda s: s | {min(s): s[min(s)].to("meta")}),
        "it asks for torch._utils._rebuild_meta_tensor",
    ),
    "sparse tensors": (
        lambda f: _bin(f, lambda s: s | {min(s): s[min(s)].to_sparse()}),
        "it asks for torch.*sparse",
    ),
    "names of another type": (lambda f: _bin(f, lambda s: s | {1: s[min(s)]}), "is not a plain dictionary"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged: it holds no JSON"),
    "config of another attention": (
        lambda f: (f / "config.json").write_text('{"attn_config": [1]}'),
        r"its configuration: attn_config is \[1\]; it must be a mapping",
    ),
    "deep": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map":' + "[" * 100_000),
        "is damaged: its JSON does not parse",
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_folders(tmp_path: Path, attack: str) -> None:
    model().save_pretrained(tmp_path / "a", max_shard_size="70KB")
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "secret.safetensors")
    change, message = HOSTILE[attack]
    change(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        load_weights(model(), tmp_path / "a")
