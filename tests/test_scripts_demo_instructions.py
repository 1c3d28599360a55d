"""The fine-tuning demos' data; and, in the slow part, the demos themselves: pretrained, then taught, then better."""

import importlib.util
import json
from pathlib import Path

import pytest

from mpt import MptForCausalLM
from scripts import check_run, demo_corpus, demo_instructions, plot_extrapolation
from trainer import load_config, run
from trainer.data.prepare import PrepareOptions, prepare

ROOT = Path(__file__).parent.parent
SOURCE = '''
class Box:
    @property
    def size(self, *, unit="cm"):
        """Return the size of the box,
        in a unit.

        More about it.
        """
        return self._size * UNITS[unit]

def hidden(a):
    return a

def add(a, b, /, c=1):
    """Add three numbers."""
    return a + b + c

def stop():
    """Stop whatever runs."""
'''


def test_documented_functions_become_questions_and_answers():
    found = list(demo_instructions.functions(SOURCE))
    assert sorted(f.name for f in found) == ["add", "size", "stop"]
    (size,) = (f for f in found if f.name == "size")
    assert size.summary == "Return the size of the box, in a unit."
    assert size.source == "def size(self, *, unit='cm'):\n    return self._size * UNITS[unit]"
    answers = {f.name: demo_instructions.arguments_answer(f) for f in found}
    assert answers == {"add": "add takes a, b and c.", "size": "size takes unit.", "stop": "stop takes no arguments."}
    assert list(demo_instructions.functions("def broken(:")) == []


def test_files_of_both_kinds_each_example_once(tmp_path, capsys):
    for name, texts in (("corpus", [SOURCE, SOURCE]), ("validation", [SOURCE])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert demo_instructions.main(["--corpus", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    for part in ("train", "val"):
        rows = [json.loads(x) for x in (tmp_path / "out" / "instruct" / f"{part}.jsonl").read_text().splitlines()]
        assert len(rows) == 6 and set(rows[0]) == {"instruction", "context", "response"}
        rows = [json.loads(x) for x in (tmp_path / "out" / "chat" / f"{part}.jsonl").read_text().splitlines()]
        assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant"] * 2 and len(rows) == 3
    assert demo_instructions.main(["--corpus", str(tmp_path / "nowhere")]) == 2
    assert "nowhere/corpus.jsonl is not there; run scripts/demo_corpus.py first" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demos_learn(tmp_path, monkeypatch):
    """The recipes as they are, but shorter."""
    demo_corpus.make_demo(tmp_path / "data/demo", 1)
    demo_instructions.make_demo(tmp_path / "data/demo", tmp_path / "data/demo-instructions")
    monkeypatch.chdir(tmp_path)
    quiet = ["loggers.progress=false", "save_interval=0ba", "eval_interval=0ba", "scheduler.t_warmup=5ba"]
    assert run(load_config(ROOT / "yaml/mpt-tiny.yaml", ["max_duration=60ba", *quiet])) == 0
    margins = {"mpt-tiny-instruct": "1", "mpt-tiny-chat": "1"}
    if importlib.util.find_spec("peft"):
        margins["mpt-tiny-lora"] = "0.5"  # adapters on a base of 60 steps have less to work with
    for name, margin in margins.items():
        assert run(load_config(ROOT / f"yaml/{name}.yaml", ["max_duration=60ba", *quiet])) == 0
        assert check_run.main([f"runs/{name}", "--margin", margin]) == 0
        assert "## Prompt 3" in Path(f"runs/{name}/samples.md").read_text()

    corpus = PrepareOptions(
        inputs=("data/demo/corpus.jsonl",), val_inputs=("data/demo/validation.jsonl",), out="data/demo-books",
        tokenizer="data/demo", val_fraction=0.0, excerpt_tokens=2048,
    )  # fmt: skip
    prepare(corpus, quiet=True)
    short = ["max_duration=20ba", "length_curriculum=[{max_seq_len: 512, until: 8ba}]", "eval_subset_num_batches=16"]
    assert run(load_config(ROOT / "yaml/mpt-tiny-storywriter.yaml", [*quiet, *short])) == 0
    assert check_run.main(["runs/mpt-tiny-storywriter", "--margin", "0.05"]) == 0
    sequences = plot_extrapolation.read_sequences(Path("data/demo-books"), "val", 2048, 8)
    base, writer = (
        plot_extrapolation.losses_by_position(MptForCausalLM.from_pretrained(f"runs/{name}/export"), sequences)
        for name in ("mpt-tiny", "mpt-tiny-storywriter")
    )
    assert writer[1024:].mean() < base[1024:].mean() - 0.05
