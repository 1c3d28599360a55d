"""Weights on disk: what transformers makes of our folders, round trips, sharded parameters, files to be refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MptConfig as TheirConfig
from transformers import MptForCausalLM as TheirModel

from mpt import MptConfig, MptForCausalLM, MptModel
from mpt.checkpoint import load_weights, save_hf, unsupported_by_transformers

SHAPE = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 32}
IDS = torch.arange(34).view(2, 17)


def model(**extra) -> MptForCausalLM:
    return MptForCausalLM(MptConfig(**(SHAPE | extra))).eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())


@pytest.mark.parametrize("size", ["5GB", "70KB", 1])
@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_what_we_save(tmp_path: Path, size: int | str, tie: bool) -> None:
    ours = model(tie_word_embeddings=tie)
    folder = tmp_path / "export"
    ours.save_pretrained(folder, max_shard_size=size)
    theirs = TheirModel.from_pretrained(folder)
    ours_logits, their_logits = ours(IDS).logits, theirs(IDS).logits
    assert (ours_logits - their_logits).abs().max() <= 1e-5 * their_logits.abs().max()
    files = sorted(folder.glob("*.safetensors"))
    if size == "5GB":
        assert [f.name for f in files] == ["model.safetensors"]
    else:
        total = len(files)
        assert total > 2 and files[0].name == f"model-00001-of-{total:05d}.safetensors"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in ours.parameters())
        assert set(index["weight_map"]) == set(ours.state_dict())
        assert max(sum(t.nbytes for t in load_file(f).values()) for f in files) <= max(70_000, 97 * 64 * 4)
    assert same(MptForCausalLM.from_pretrained(folder), ours)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.old"))


def test_we_load_what_transformers_saves(tmp_path: Path) -> None:
    theirs = TheirModel(TheirConfig(**SHAPE)).bfloat16()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    theirs.transformer.save_pretrained(tmp_path / "body")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    for folder in ("whole", "shards", "body"):
        ours = MptForCausalLM.from_pretrained(tmp_path / folder)
        assert ours.transformer.wte.weight.dtype == torch.bfloat16 and not ours.training
        assert same(ours, theirs)
        wide = MptForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert torch.equal(wide.transformer.wte.weight, theirs.transformer.wte.weight.float())
        assert same(MptModel.from_pretrained(tmp_path / folder), theirs.transformer)


def test_bin_folders(tmp_path: Path) -> None:
    ours = model()
    ours.config.save_pretrained(tmp_path)
    state = ours.state_dict()
    torch.save(state | {"lm_head.weight": state["transformer.wte.weight"].clone()}, tmp_path / "pytorch_model.bin")
    assert same(MptForCausalLM.from_pretrained(tmp_path), ours)
    torch.save(state | {"lm_head.weight": state["transformer.wte.weight"] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight"):
        load_weights(model(), tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(state)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert same(MptForCausalLM.from_pretrained(tmp_path), ours)


def test_bin_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused: it asks for posix\.mkdir"):
        load_weights(model(), tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_streaming_save(tmp_path: Path) -> None:
    """Tensors from functions, one shard's worth at a time; a rank that does not write still takes part."""
    ours, calls = model(), []

    def get(name: str, p: torch.Tensor):
        return lambda: calls.append(name) or p

    lazy = [(name, get(name, p)) for name, p in ours.named_parameters()]
    save_hf(lazy, ours.config, tmp_path / "no", write=False)
    assert calls == [name for name, _ in lazy] and not (tmp_path / "no").exists()
    (tmp_path / "tokenizer.json").write_text("{}")
    files = [tmp_path / "tokenizer.json"]
    save_hf(lazy, ours.config, tmp_path / "a", dtype=torch.bfloat16, tokenizer_files=files)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    theirs = TheirModel.from_pretrained(tmp_path / "a")
    assert theirs.dtype == torch.bfloat16 and same(theirs.transformer, ours.transformer.bfloat16())


def test_saving_again_replaces_only_a_model(tmp_path: Path) -> None:
    one, two = model(), model()
    one.save_pretrained(tmp_path / "a", max_shard_size=1)
    two.save_pretrained(tmp_path / "a")
    assert same(MptForCausalLM.from_pretrained(tmp_path / "a"), two)
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"config.json", "model.safetensors"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not a model's folder"):
        one.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["a.tmp", "a.old"])
def test_saving_deletes_nothing_but_exports(tmp_path: Path, name: str) -> None:
    ours = model()
    ours.save_pretrained(tmp_path / "a")
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=rf"{name} exists and is not a model's folder"):
        ours.save_pretrained(tmp_path / "a")
    assert (tmp_path / name / "thesis.txt").exists() and (tmp_path / "a" / "model.safetensors").exists()


def test_a_save_goes_on_after_one_that_was_cut_off(tmp_path: Path) -> None:
    ours = model()

    def cut() -> torch.Tensor:
        raise KeyboardInterrupt

    named = list(ours.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        save_hf([*named[:-1], (named[-1][0], cut)], ours.config, tmp_path / "a", max_shard_size=1)
    assert len(list((tmp_path / "a.tmp").glob("*.safetensors"))) > 2
    ours.save_pretrained(tmp_path / "a")
    assert same(MptForCausalLM.from_pretrained(tmp_path / "a"), ours) and not (tmp_path / "a.tmp").exists()


def test_save_errors(tmp_path: Path) -> None:
    ours = model()
    named = list(ours.named_parameters())
    for given, message in (
        (named[1:], r"1 parameters were not given, the first of them transformer\.wte\.weight"),
        ([*named, named[0]], r"wte\.weight .* is given twice"),
        ([*named, ("score.weight", torch.ones(2, 64))], r"score\.weight .* is not a parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            save_hf(given, ours.config, tmp_path / "a")
        assert not (tmp_path / "a").exists()
    for size in ("5 apples", 0):
        with pytest.raises(ValueError, match="max_shard_size is"):
            save_hf(named, ours.config, tmp_path / "a", max_shard_size=size)


def test_save_warns_of_what_transformers_ignores(tmp_path: Path) -> None:
    ours = model(attn_config={"alibi_bias_max": 16, "qk_ln": True})
    with pytest.warns(UserWarning, match=r"alibi_bias_max=16\.0, attn_config\.qk_ln=True"):
        ours.save_pretrained(tmp_path / "a")
    assert same(MptForCausalLM.from_pretrained(tmp_path / "a"), ours)
    assert unsupported_by_transformers(model().config) == []


def test_table_of_what_does_not_fit(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "a")
    larger = model(vocab_size=128, n_layers=3, attn_config={"attn_type": "multiquery_attention"})
    before = [p.clone() for p in larger.parameters()]
    with pytest.raises(ValueError) as error:
        load_weights(larger, tmp_path / "a")
    lines = str(error.value).splitlines()
    assert lines[0].endswith("does not fit the model, 9 weights differ:")
    assert "  missing     transformer.blocks.2.norm_1.weight (64,)" in lines
    assert "  shape       transformer.wte.weight expected (128, 64), found (97, 64)" in lines
    assert all(torch.equal(a, b) for a, b in zip(before, larger.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"unexpected  transformer\.blocks\.1\.attn\.Wqkv\.weight"):
        load_weights(model(n_layers=1), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["transformer.norm_f.weight"] = tensors["transformer.norm_f.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match=r"dtype       transformer\.norm_f\.weight is stored as no kind of float"):
        load_weights(model(), tmp_path / "a")


def test_load_warns_of_another_behaviour(tmp_path: Path) -> None:
    """Weights fit, but clip_qkv or ALiBi would be lost."""
    model(attn_config={"clip_qkv": 6}).save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"attn_config\.clip_qkv 6\.0 there, None here"):
        load_weights(model(), tmp_path / "a")


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
    "meta tensors": (lambda f: _bin(f, lambda s: s | {min(s): s[min(s)].to("meta")}), "it asks for torch._utils._rebuild_meta_tensor"),
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


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "{", None])
def test_a_config_that_is_none(tmp_path: Path, content: str | None) -> None:
    if content is None:
        (tmp_path / "config.json").mkdir()
    else:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|cannot be read)"):
        MptConfig.from_pretrained(tmp_path)


def test_hub_cache_links_load(tmp_path: Path) -> None:
    """Hub downloads are folders of links; only names that lead elsewhere are refused."""
    ours = model()
    ours.save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / file).symlink_to(tmp_path / "blobs" / file)
    assert same(MptForCausalLM.from_pretrained(tmp_path / "snapshot"), ours)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        load_weights(model(), tmp_path)
    with pytest.raises(ValueError, match="mpt-7b does not exist; give a model.s folder"):
        load_weights(model(), tmp_path / "mosaicml/mpt-7b")
