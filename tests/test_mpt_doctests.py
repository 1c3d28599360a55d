"""The guide to the models, run as a session on a tiny checkpoint; docstrings of all public names, and help(mpt)."""

import doctest
import inspect
import pydoc
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mpt
import mpt.outputs

GUIDE = Path(__file__).parent.parent / "docs" / "model.md"
TEXT = "Hello , my dog is cute HuggingFace a company based in Paris and New York Who was Jim Henson ? nice puppet"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guide calls mosaicml/mpt-7b: a folder of that name, as the hub has it, of tiny widths."""
    folder = tmp_path / "mosaicml" / "mpt-7b"
    config = mpt.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64, max_seq_len=64)
    mpt.MptForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *TEXT.split()])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_input_names=names).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:mosaicml/mpt-7b has no:UserWarning")
def test_the_guide_runs(checkpoint: None) -> None:
    text = GUIDE.read_text(encoding="utf-8").replace("```\n", "\n")
    session = doctest.DocTestParser().get_doctest(text, {}, "model.md", str(GUIDE), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    results = runner.run(session, out=said.append)
    assert results.failed == 0, "".join(said)
    used = {name for name in mpt.__all__ if f"import {name}" in text or f", {name}" in text}
    assert used >= {name for name in mpt.__all__ if name.startswith("MptFor")} and results.attempted > 40


def test_every_public_name_is_explained() -> None:
    for name in mpt.__all__:
        cls = getattr(mpt, name)
        assert cls.__doc__ and not cls.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"
        for key, member in inspect.getmembers(cls):
            if not key.startswith("_") and getattr(member, "__module__", "").startswith("mpt"):
                assert member.__doc__, f"{name}.{key} has no docstring"
        if "forward" in vars(cls):
            assert "(B, S" in cls.forward.__doc__ and "ValueError names" in cls.forward.__doc__, name
    for cls in mpt.outputs.ModelOutput.__subclasses__():
        assert "(B, " in cls.__doc__


def test_help() -> None:
    """What help(mpt) prints: the package's own words first, and every name."""
    text = pydoc.plain(pydoc.render_doc(mpt))
    assert "as transformers' users know it" in text[:300]
    assert all(name in text for name in mpt.__all__)
