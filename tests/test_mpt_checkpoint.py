"""Weights on disk: what transformers makes of our folders, checkpoints of every maker, what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    HUB_CONFIG,
    HUB_FORMS,
    IDS,
    MOSAIC_GPT_CONFIG,
    mosaic_gpt,
    mosaic_gpt_name,
    published,
    published_shapes,
    same,
    write_composer,
    write_hub_folder,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers import MptConfig as TheirConfig
from transformers import MptForCausalLM as TheirModel

from mpt import MptConfig, MptForCausalLM, MptModel
from mpt.checkpoint import load_weights, match, open_checkpoint, save_hf, unsupported_by_transformers
from mpt.config import count_parameters, parameter_shapes

SHAPE = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 32}


def model(**extra) -> MptForCausalLM:
    return MptForCausalLM(MptConfig(**(SHAPE | extra))).eval()


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


def test_a_redundant_head(tmp_path: Path) -> None:
    """Some files hold the tied lm_head.weight a second time."""
    ours = model()
    ours.config.save_pretrained(tmp_path)
    state = ours.state_dict()
    torch.save(state | {"lm_head.weight": state["transformer.wte.weight"].clone()}, tmp_path / "pytorch_model.bin")
    assert same(MptForCausalLM.from_pretrained(tmp_path), ours)
    torch.save(state | {"lm_head.weight": state["transformer.wte.weight"] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight"):
        load_weights(model(), tmp_path)


@pytest.mark.parametrize("form", HUB_FORMS)
def test_hub_folders(tmp_path: Path, form: str) -> None:
    """MPT-7B's files as they are on the hub, at a width of 64."""
    model = published()
    state = model.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == published_shapes(64, 2, 97)
    write_hub_folder(tmp_path / "mpt-7b", state, form)
    loaded = MptForCausalLM.from_pretrained(tmp_path / "mpt-7b")
    assert loaded.transformer.wte.weight.dtype == torch.bfloat16 and not loaded.training
    assert same(loaded, model) and loaded.config == model.config
    assert same(MptModel.from_pretrained(tmp_path / "mpt-7b"), model.transformer)
    assert open_checkpoint(tmp_path / "mpt-7b").companions.keys() == {"tokenizer.json"}
    # And back: the export is what transformers reads, without running the folder's code.
    loaded.save_pretrained(tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32, trust_remote_code=False)
    ours = MptForCausalLM.from_pretrained(tmp_path / "mpt-7b", dtype=torch.float32)
    assert same(ours, theirs)
    a, b = ours(IDS).logits, theirs(IDS).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_storywriter(tmp_path: Path) -> None:
    """Its config.json, which transformers cannot parse; its clip_qkv is what keeps it from gibberish."""
    attn = HUB_CONFIG["attn_config"] | {"clip_qkv": 6, "alibi_bias_max": 16, "attn_pdrop": 0.0}
    config = HUB_CONFIG | {"attn_config": attn, "max_seq_len": 65536}
    write_hub_folder(tmp_path, published().state_dict(), "bin shards", config)
    loaded = MptForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.attn_config.clip_qkv == 6.0 and loaded.config.attn_config.alibi_bias_max == 16.0
    assert loaded.config.max_seq_len == 65536


@pytest.mark.parametrize("form", [*HUB_FORMS, "composer"])
def test_mosaic_gpt(tmp_path: Path, form: str) -> None:
    wanted = mosaic_gpt()
    old = {mosaic_gpt_name(name): tensor for name, tensor in wanted.state_dict().items()}
    assert "transformer.blocks.1.mlp.mlp_up.weight" in old and "transformer.ln_f.weight" in old
    if form == "composer":
        weights = {f"model.{name}": tensor for name, tensor in old.items()}
        write_composer(tmp_path, wanted, MOSAIC_GPT_CONFIG, model=weights)
    else:
        write_hub_folder(tmp_path, old, form, MOSAIC_GPT_CONFIG)
    loaded = MptForCausalLM.from_pretrained(tmp_path)
    assert same(loaded, wanted) and loaded.config == wanted.config


def _sparse_hub_folder(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> int:
    """model.safetensors of bf16 zeros that take no room on disk; returns the bytes of the tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return end


@pytest.mark.parametrize(
    ("d", "heads", "layers", "parameters", "total_size"),
    [(4096, 32, 32, 6_649_286_656, 13_298_573_312), (7168, 64, 48, 29_957_200_896, 59_914_401_792)],
)
def test_full_size(tmp_path: Path, d: int, heads: int, layers: int, parameters: int, total_size: int) -> None:
    """MPT-7B and MPT-30B: every name and shape, and the sizes that the hub's index files state."""
    config = HUB_CONFIG | {"d_model": d, "n_heads": heads, "n_layers": layers, "vocab_size": 50432, "max_seq_len": 8192}
    shapes = published_shapes(d, layers, 50432)
    assert _sparse_hub_folder(tmp_path / "hub", config, shapes) == total_size
    source = open_checkpoint(tmp_path / "hub")
    with torch.device("meta"):
        built = MptForCausalLM(source.config()).bfloat16()
    assert list(match(built, source)) == list(shapes)
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == shapes
    assert list(parameter_shapes(source.config())) == list(shapes)
    assert built.num_parameters() == count_parameters(source.config()) == parameters
    assert sum(p.nbytes for p in built.parameters()) == total_size


def test_a_configuration_of_another_size_costs_nothing(tmp_path: Path) -> None:
    """Neither blocks without end nor terabytes are made before the weights' shapes are looked at."""
    for changes, message in (
        ({"n_layers": 2**31 - 1}, "n_layers 2147483647, and it holds 14 tensors"),
        ({"vocab_size": 2**31 - 1}, r"transformer\.wte\.weight expected \(2147483647, 64\), found \(97, 64\)"),
    ):
        write_hub_folder(tmp_path, published().state_dict(), "safetensors", HUB_CONFIG | changes)
        with pytest.raises(ValueError, match=message):
            MptForCausalLM.from_pretrained(tmp_path)


def test_streaming_save(tmp_path: Path) -> None:
    """Tensors from functions, one shard's worth at a time; a rank that does not write still takes part."""
    ours, calls = model(), []

    def get(name: str, p: torch.Tensor):
        return lambda: calls.append(name) or p

    lazy = [(name, get(name, p)) for name, p in ours.named_parameters()]
    save_hf(lazy, ours.config, tmp_path / "no", write=False)
    assert calls == [name for name, _ in lazy] and not (tmp_path / "no").exists()
    save_hf(lazy, ours.config, tmp_path / "a", dtype=torch.bfloat16, companions={"tokenizer.json": b"{}"})
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


def test_saving_keeps_what_else_a_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that was saved before its model, notes, folders, links; shards of an older save are replaced. A save
    with a tokenizer of its own leaves none of another's.
    """
    folder, ours = tmp_path / "a", model()
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    ours.save_pretrained(folder, max_shard_size=1)
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("years of work")
    (folder / "link").symlink_to("notes/thesis.txt")
    for step in range(2):
        if step == 1:  # a disk without links

            def refuse(*_: object, **__: object) -> None:
                raise OSError

            monkeypatch.setattr("os.link", refuse)
        ours.save_pretrained(folder)
        names = {"config.json", "model.safetensors", "tokenizer.json", "notes", "link"}
        assert {f.name for f in folder.iterdir()} == names and (folder / "link").is_symlink()
        assert (folder / "link").read_text() == (folder / "notes" / "thesis.txt").read_text() == "years of work"
    save_hf(ours.named_parameters(), ours.config, folder, companions={"merges.txt": b""})
    assert not (folder / "tokenizer.json").exists() and (folder / "merges.txt").exists()
    assert (folder / "notes" / "thesis.txt").exists() and not (tmp_path / "a.old").exists()


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (".", "", tmp_path.parent, "a/.."):
        with pytest.raises(ValueError, match="the current folder, and would be replaced"):
            model().save_pretrained(place)
    model().save_pretrained("a")
    assert (tmp_path / "a" / "model.safetensors").exists()


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
    with pytest.raises(ValueError, match=r"wte\.weight is on the meta device and has no values"):
        model().to("meta").save_pretrained(tmp_path / "meta")
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
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/a cannot be made \(Not a directory\); give a place"):
        ours.save_pretrained(tmp_path / "file" / "a")


@pytest.mark.parametrize(("count", "message"), [(0, "cuda:2, but torch sees no GPU; give cpu"), (2, "sees 2 GPUs")])
def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=message):
        MptForCausalLM.from_pretrained(tmp_path / "read later", device="cuda:2")


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


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "{", None])
def test_a_config_that_is_none(tmp_path: Path, content: str | None) -> None:
    if content is None:
        (tmp_path / "config.json").mkdir()
    else:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (is damaged: its JSON|cannot be read)"):
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
    with pytest.raises(ValueError, match=r"holds neither"):
        MptForCausalLM.from_pretrained(tmp_path)
    write_hub_folder(tmp_path / "hub", published().state_dict(), "bin")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "pytorch_model.bin").symlink_to("../../blobs/1")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin leads to a file that is not there; copy the files"):
        MptForCausalLM.from_pretrained(tmp_path / "cache")
    (tmp_path / "hub" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"hub has no configuration; put the model's config\.json into it"):
        MptForCausalLM.from_pretrained(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"is a part of a model's folder; give the folder, .*hub"):
        MptForCausalLM.from_pretrained(tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"mpt-7b does not exist; give a model's folder"):
        load_weights(model(), tmp_path / "mosaicml/mpt-7b")
