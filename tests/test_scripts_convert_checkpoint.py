"""convert_checkpoint.py: from every form to a Hugging Face folder, to Composer's and back, and what it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from checkpoint_files import (
    HUB_CONFIG,
    IDS,
    MOSAIC_GPT_CONFIG,
    TOKENIZER,
    mosaic_gpt,
    mosaic_gpt_name,
    published,
    published_shapes,
    same,
    write_composer,
    write_hub_folder,
)
from safetensors.torch import load_file
from test_mpt_step_folder import save as save_run
from transformers import AutoModelForCausalLM

import mpt.convert
from mpt import (
    MptConfig,
    MptForCausalLM,
    MptForQuestionAnswering,
    MptForSequenceClassification,
    MptForTokenClassification,
)
from scripts.convert_checkpoint import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write(folder: Path, kind: str) -> tuple[Path, MptForCausalLM]:
    """A checkpoint of a kind, and the model that it is of."""
    if kind == "mosaic_gpt":
        wanted = mosaic_gpt()
        old = {mosaic_gpt_name(name): tensor for name, tensor in wanted.state_dict().items()}
        write_hub_folder(folder, old, "bin shards", MOSAIC_GPT_CONFIG)
        return folder, wanted
    wanted = published()
    if kind == "composer":
        return write_composer(folder, wanted), wanted
    if kind == "run":
        wanted = wanted.float()
        return save_run(folder, wanted).parents[1], wanted
    write_hub_folder(folder, wanted.state_dict(), kind)
    return folder, wanted


@pytest.mark.parametrize("kind", ["safetensors shards", "bin", "composer", "mosaic_gpt", "run"])
def test_to_a_folder_and_to_composer_and_back(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, wanted = write(tmp_path / "from", kind)
    assert main([str(source), str(tmp_path / "hf"), "--max-shard-size", "100000"]) == 0
    out = capsys.readouterr()
    assert "logits before and after differ by 0.0e+00" in out.out
    assert f"{wanted.num_parameters():,} parameters in {str(wanted.transformer.wte.weight.dtype)[6:]}" in out.out
    loaded = MptForCausalLM.from_pretrained(tmp_path / "hf")
    assert same(loaded, wanted) and loaded.config == wanted.config
    assert "auto_map" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    files = sorted(tmp_path.glob("hf/*.safetensors"))
    assert len(files) > 1
    stored = {name: tuple(t.shape) for file in files for name, t in load_file(file).items()}
    assert stored == published_shapes(64, 2, 97, qk_ln=kind == "mosaic_gpt")
    if kind != "run":
        assert json.loads((tmp_path / "hf" / "tokenizer.json").read_text()) == TOKENIZER
        assert not list(tmp_path.glob("hf/*.py"))
    if kind == "mosaic_gpt":
        assert "warning: transformers (5.23) does not honour attn_config.qk_ln=True" in out.err
    else:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, trust_remote_code=False)
        ours = MptForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        a, b = ours(IDS).logits, theirs(IDS).logits
        assert same(ours, theirs) and (a - b).abs().max() <= 1e-5 * b.abs().max()

    assert main([str(tmp_path / "hf"), str(tmp_path / "made" / "ep0-ba0-rank0.pt")]) == 0
    state = torch.load(tmp_path / "made" / "ep0-ba0-rank0.pt", weights_only=True)["state"]
    assert state["model"].keys() == {f"model.{name}" for name in stored}
    assert all(torch.equal(state["model"][f"model.{name}"], p) for name, p in wanted.named_parameters())
    assert state["integrations"]["huggingface"]["model"]["config"]["content"]["d_model"] == 64
    assert main([str(tmp_path / "made" / "ep0-ba0-rank0.pt"), str(tmp_path / "again")]) == 0
    assert same(MptForCausalLM.from_pretrained(tmp_path / "again"), wanted)
    if kind != "run":
        assert json.loads((tmp_path / "again" / "tokenizer.json").read_text()) == TOKENIZER


@pytest.mark.parametrize("cls", [MptForSequenceClassification, MptForTokenClassification, MptForQuestionAnswering])
def test_classifiers(tmp_path: Path, cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder to a folder, of their class; transformers' gives the same logits."""
    config = MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=97, num_labels=3, pad_token_id=0)
    trained = cls(config).eval()
    write_hub_folder(tmp_path / "from", trained.state_dict(), "bin", config.to_dict())
    assert main([str(tmp_path / "from"), str(tmp_path / "to"), "--dtype", "bfloat16"]) == 0
    count = trained.num_parameters()
    assert f"{cls.__name__}, {count:,} parameters in bfloat16" in (said := capsys.readouterr().out)
    assert "differ by 0.0e+00" in said
    assert json.loads((tmp_path / "to" / "config.json").read_text())["architectures"] == [cls.__name__]
    assert same(cls.from_pretrained(tmp_path / "to"), trained.bfloat16())
    theirs = getattr(transformers, cls.__name__).from_pretrained(tmp_path / "to", dtype=torch.float32)
    (ours, *_), (other, *_) = trained.float()(IDS, return_dict=False), theirs.eval()(IDS, return_dict=False)
    assert float((ours - other).abs().max() / ours.abs().max()) < 1e-5
    assert main([str(tmp_path / "from"), str(tmp_path / "a.pt")]) == 2
    assert f"is of {cls.__name__}, and a Composer file holds a language model; give" in capsys.readouterr().err


def test_another_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, wanted = write(tmp_path / "from", "bin")
    for to in ("wide", "wide.pt"):
        assert main([str(source), str(tmp_path / to), "--dtype", "float32"]) == 0
        loaded = MptForCausalLM.from_pretrained(tmp_path / to)
        assert loaded.transformer.wte.weight.dtype == torch.float32 and same(loaded, wanted.float())
    with torch.no_grad():
        wanted.transformer.wte.weight[0, 0] = 1e5
    write_hub_folder(tmp_path / "large", wanted.bfloat16().state_dict(), "bin")
    assert main([str(tmp_path / "large"), str(tmp_path / "half"), "--dtype", "float16"]) == 2
    assert "transformer.wte.weight holds numbers beyond the range of float16; use bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


def test_the_tokenizer_of_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = write(tmp_path / "from", "bin")
    (source / "tokenizer.json").unlink()
    assert main([str(source), str(tmp_path / "a"), "--no-check"]) == 0
    assert "tokenizer files: none (see --tokenizer)" in capsys.readouterr().out
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokenizer.json").write_text("{}")
    assert main([str(source), str(tmp_path / "a"), "--no-check", "--tokenizer", str(tmp_path / "tokens")]) == 0
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    assert main([str(source), str(tmp_path / "a"), "--no-check", "--tokenizer", str(tmp_path)]) == 2
    assert "is no folder with a tokenizer.json" in capsys.readouterr().err


def test_the_check_sees_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = write(tmp_path / "from", "bin")
    save_hf = mpt.convert.save_hf

    def spoiled(tensors, *arguments, **options):
        return save_hf([(name, read() * 1.02) for name, read in tensors], *arguments, **options)

    monkeypatch.setattr(mpt.convert, "save_hf", spoiled)
    assert main([str(source), str(tmp_path / "a")]) == 1
    assert "that is more than 1e-05; do not use" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "a"), "--no-check"]) == 0


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        (lambda f: f, "from", "is, or holds, the checkpoint that is converted"),
        (lambda f: f, ".", "is, or holds, the checkpoint that is converted"),
        (lambda f: f, "notes", "exists and is not a model's folder"),
        (lambda f: f, "notes/a.pt", "a.pt exists; remove it, or give another place"),
        (lambda f: (f / "config.json").unlink(), "a", "has no configuration"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK"), "a", "is truncated, or no file of torch.save's"),
        (
            lambda f: (f / "config.json").write_text(json.dumps(HUB_CONFIG | {"n_layers": 3})),
            "a",
            "missing     transformer.blocks.2.norm_1.weight (64,)",
        ),
        (shutil.rmtree, "a", "does not exist; give a model's folder or checkpoint, or a name on the hub"),
    ],
)
def test_refused(tmp_path: Path, change, to: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = write(tmp_path / "from", "bin")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.pt").write_text("years of work")
    change(source)
    assert main([str(source), str(tmp_path / to)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert {path.name for path in tmp_path.iterdir()} <= {"from", "notes"}
    assert (tmp_path / "notes" / "a.pt").read_text() == "years of work"


def test_a_size_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = write(tmp_path / "from", "bin")
    for size in ("0", "5 apples"):
        assert main([str(source), str(tmp_path / "a"), "--max-shard-size", size]) == 2
        assert "max_shard_size is" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_seen_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = write(tmp_path / "from", "bin")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for to in ("a", "a.pt"):
        assert main([str(source), str(tmp_path / to)]) == 2
        assert "0.0 GB free, and the weights take" in capsys.readouterr().err


def test_a_composer_file_that_was_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = write(tmp_path / "from", "bin")

    def cut(*_) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(mpt.convert, "_cast", cut)
    assert main([str(source), str(tmp_path / "a.pt")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["from"]
