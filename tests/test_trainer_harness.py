"""Likelihoods and continuations as tasks ask for them, each against the model in float64 on one text at a time."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_files import EOS, write_tokenizer
from tokenizers import Tokenizer

from mpt import MptConfig, MptForCausalLM
from trainer import harness
from trainer.errors import InputError
from trainer.harness import TextModel, find_tasks, generation_options, run_tasks, windows

SHAPE = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 310, "max_seq_len": 24, "initializer_range": 0.3}
VARIANTS = {
    "plain": {},
    "prefix": {"attn_config": {"prefix_lm": True}},
    "learned": {"attn_config": {"alibi": False}},
    "logit scale": {"logit_scale": 0.5, "tie_word_embeddings": False},
}
PAIRS = [
    ("a small text", " to learn"),
    ("a small text ", "to learn"),  # the space is the continuation's
    ("", "a small text"),
    ("", EOS + "some"),
    ("merges from, and a small text again, a small text again and again", " text"),  # of which the end is read
    ("x", "a"),
    ("  \n", "again"),
    ("some", ""),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return {"tokenizer.json": write_tokenizer(tmp_path_factory.mktemp("tokenizer")).read_bytes()}


def build(variant: str = "plain", **fields: Any) -> MptForCausalLM:
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of positions
        return MptForCausalLM(MptConfig(**(SHAPE | VARIANTS[variant] | fields))).eval()


def wide(model: MptForCausalLM) -> MptForCausalLM:
    out = MptForCausalLM(model.config).double().eval()
    out.load_state_dict(model.state_dict())
    return out


def scored(model: MptForCausalLM, context: list[int], continuation: list[int], length: int) -> tuple[float, bool]:
    """ln p of the continuation and whether it is greedy, token by token."""
    total, greedy, text = 0.0, True, [*context, *continuation]
    keep = text[-length - 1 : -1]
    prefix = None
    if model.config.attn_config.prefix_lm:
        prefix = torch.tensor([[i <= len(keep) - len(continuation) for i in range(len(keep))]])
    logp = model(torch.tensor([keep]), prefix_mask=prefix).logits[0].log_softmax(-1)
    for i, token in enumerate(continuation):
        at = logp[len(keep) - len(continuation) + i]
        total += at[token].item()
        greedy &= int(at.argmax()) == token
    return total, greedy


def split(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """By hand, for each of PAIRS: what lm-eval makes of it."""
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    if context == "" and continuation.startswith(EOS):
        return [0], ids(continuation)[1:]
    stem = ids(context.rstrip())
    return stem or [0], ids(context + continuation)[len(stem) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loglikelihoods(variant: str, files: dict[str, bytes]) -> None:
    """In float64 one by one, whatever the batch and however many logits are held; cut to the last max_length tokens."""
    model = build(variant)
    tokenizer, reference = Tokenizer.from_buffer(files["tokenizer.json"]), wide(model)
    for length in (None, 9):
        wanted = []
        for context, continuation in PAIRS:
            pair = split(tokenizer, context, continuation)
            wanted.append(scored(reference, *pair, length or 24) if pair[1] else (0.0, True))
        # The likeliest token is likeliest to be asked for with this one.
        for batch_size, logits in ((1, 1024), (3, 2), (None, 5)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(harness, "LOGITS", logits)
                text_model = TextModel(model, files, max_length=length, batch_size=batch_size, quiet=True)
                found = text_model.loglikelihoods(PAIRS)
            assert [p for p, _ in found] == pytest.approx([p for p, _ in wanted], rel=1e-5)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_greedy(files: dict[str, bytes]) -> None:
    """True where every token is the likeliest, and for the first of two only when asked for it alone."""
    model = build()
    text_model = TextModel(model, files, quiet=True)
    context = text_model.encode("a small")
    follows = model.generate(torch.tensor([context]), max_new_tokens=3, eos_token_id=309)[0, len(context) :].tolist()
    wrong = [*follows[:2], (follows[2] + 1) % 310]
    found = text_model._score([(context, follows), (context, wrong), (context, wrong[:2])], "test")
    assert [greedy for _, greedy in found] == [True, False, True]


def test_windows() -> None:
    """Ten tokens and a prefix, read four at a time: each is predicted once, the last ones after as much as can be."""
    assert windows(list(range(10)), 99, 4) == [
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert windows([], 99, 4) == []
    assert windows([1, 2], 99, 4) == [([99], [1, 2])]


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_rolling(batch_size: int | None, files: dict[str, bytes]) -> None:
    model = build()
    text_model, reference = TextModel(model, files, max_length=5, batch_size=batch_size, quiet=True), wide(model)
    texts = ["a small text to learn some merges from", "", "x", "and a small text again"]
    wanted = []
    for text in texts:
        ids, total = [0, *text_model.encode(text)], 0.0
        for start in range(1, len(ids), 5):
            end = min(start + 5, len(ids))
            logp = reference(torch.tensor([ids[max(end - 6, 0) : end - 1]])).logits[0].log_softmax(-1)
            total += sum(logp[i - end, ids[i]].item() for i in range(start, end))
        wanted.append(total)
    assert len(text_model.encode(texts[0])) > 5 and wanted[1] == 0
    assert text_model.rolling(texts) == pytest.approx(wanted, rel=1e-5)


def test_continuations(files: dict[str, bytes]) -> None:
    """Greedy text of each prompt alone, whatever the batch: to a stop string, an end token, or the limit."""
    model = build()
    model.config.eos_token_id = 7
    plain = TextModel(model, files, batch_size=1, quiet=True)
    prompts = ["a small text", "", "merges from, and a small text again " * 2, "x"]

    def alone(prompt: str, new: int) -> list[int]:
        ids = (plain.encode(prompt) or [7])[-(24 - new) :]
        out = model.generate(torch.tensor([ids]), max_new_tokens=new, use_cache=False)[0, len(ids) :].tolist()
        return out[: out.index(7)] if 7 in out else out

    texts = [plain.tokenizer.decode(alone(prompt, 8)) for prompt in prompts]
    stop = texts[0][2:4]
    cut = [text.split(stop)[0] for text in texts]
    assert stop and cut[0] != texts[0]
    requests = [(prompt, {"until": [stop, ""], "max_gen_toks": 8}) for prompt in prompts]
    requests += [(prompt, {"until": [], "max_new_tokens": 8, "do_sample": False}) for prompt in prompts]
    for batch_size in (1, 3, None):
        text_model = TextModel(model, files, batch_size=batch_size, quiet=True)
        assert text_model.continuations(requests) == cut + texts

    model.config.eos_token_id = alone("a small text", 8)[3]
    assert TextModel(model, files, quiet=True).continuations([requests[4]]) == [
        plain.tokenizer.decode(alone("a small text", 8)[:3])
    ]
    with pytest.raises(InputError, match=r"256 new tokens leave no room for a prompt in 24: raise --max-length"):
        plain.continuations([("a", {})])


def test_processes_share_the_work(files: dict[str, bytes]) -> None:
    """Every batch is one rank's, and all ranks' results together are those of one process."""
    model = build()
    pairs = [("a small", " text"), ("to", " learn"), ("and", " a"), ("", "x"), ("this", "")]
    prompts = [
        ("a small", {"until": ["q"], "max_gen_toks": 3}),
        ("to learn", {"max_gen_toks": 3}),
        ("and", {"max_gen_toks": 2}),
    ]
    alone = TextModel(model, files, batch_size=1, max_length=300, quiet=True)
    expected = [alone.loglikelihoods(pairs), alone.continuations(prompts)]
    found: dict[int, list[dict[int, Any]]] = {0: [], 1: []}
    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2, gather=lambda part, rank=rank: found[rank].append(part) or [part])
        text_model = TextModel(model, files, batch_size=1, max_length=300, quiet=True, world=world)
        text_model.loglikelihoods(pairs), text_model.continuations(prompts)
    for first, second, whole in zip(found[0], found[1], expected):
        assert first and second and not first.keys() & second.keys()
        joined = first | second
        assert [joined.get(i, (0.0, True)) for i in range(len(whole))] == whole


def test_generation_options() -> None:
    greedy = {"max_new_tokens": 256, "stop_strings": [], "do_sample": False}
    assert generation_options({}) == greedy
    assert generation_options({"until": "\n", "temperature": 0.0, "num_beams": 1}) == greedy | {"stop_strings": ["\n"]}
    assert generation_options({"do_sample": False, "temperature": 1.0, "max_tokens": 5}) == greedy | {
        "max_new_tokens": 5
    }
    drawn = generation_options({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "until": ["a", ""]})
    assert drawn == greedy | {
        "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "stop_strings": ["a"]
    }  # fmt: skip
    with pytest.raises(InputError, match=r"generation_kwargs has best_of=2, num_beams=4, which is not supported"):
        generation_options({"num_beams": 4, "best_of": 2})


def test_the_end_token(files: dict[str, bytes]) -> None:
    """The configuration's, else that for generation, else that of the tokenizer's settings, else the usual one."""
    model = build()

    def ends(generation: Any = None, **settings: Any) -> list[int]:
        given = {"tokenizer_config.json": json.dumps(settings).encode()}
        given["generation_config.json"] = json.dumps({"eos_token_id": generation}).encode()
        return TextModel(model, files | given, quiet=True).ends

    letter = Tokenizer.from_buffer(files["tokenizer.json"]).token_to_id("e")
    assert ends() == [0]
    assert ends(eos_token="e") == ends(eos_token={"content": "e"}) == [letter]
    assert ends([7, 8], eos_token="e") == [7, 8] and ends(7) == [7]
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id is 'e'; it must be an id or a list"):
        ends("e")
    model.config.eos_token_id = [4, 5]
    assert ends([7, 8], eos_token="e") == [4, 5]


def test_refused(files: dict[str, bytes]) -> None:
    model = build("learned")
    with pytest.raises(InputError, match=r"no tokenizer.json; name a tokenizer with --tokenizer"):
        TextModel(model, {})
    with pytest.raises(InputError, match=r"tokenizer.json: the tokenizers library cannot read it"):
        TextModel(model, {"tokenizer.json": b"{}"})
    with pytest.raises(InputError, match=r"tokenizer.json has \d+ tokens, the model 270"):
        TextModel(build(vocab_size=270), files)
    with pytest.raises(InputError, match=r"--max-length 25: the model's learned positions end at max_seq_len 24"):
        TextModel(model, files, max_length=25)
    with pytest.raises(InputError, match=r"--max-length 1: give 2"):
        TextModel(model, files, max_length=1)
    with pytest.raises(InputError, match=r"tokenizer_config.json: not a JSON mapping"):
        TextModel(model, files | {"tokenizer_config.json": b"[]"})
    with pytest.raises(InputError, match=r"a continuation of 4 tokens is longer than 3: raise --max-length"):
        TextModel(model, files, max_length=3, quiet=True).loglikelihoods([("a", "bcdx")])
    nameless = json.loads(files["tokenizer.json"])
    nameless["added_tokens"][0]["content"] = "<end>"
    nameless["model"]["vocab"]["<end>"] = nameless["model"]["vocab"].pop(EOS)
    with pytest.raises(InputError, match=r"says which token ends a text"):
        TextModel(model, {"tokenizer.json": json.dumps(nameless).encode()})


def test_without_the_library(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"--tasks needs lm-eval .*pip install 'mpt-train\[eval\]'"):
        find_tasks(["arc_easy"])


QUESTIONS = [("a small", [" text", " merge", " again"], 0), ("to learn", [" some", " x"], 1), ("and", [" a", " b"], 0)]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path, said: list[str]) -> Path:
    """Three tasks of three questions, as files."""
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": answer, "said": text})
        for (question, choices, answer), text in zip(QUESTIONS, said)
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    for name, task in TASKS.items():
        where = {
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "questions.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(where | task))  # JSON is YAML
    return folder


def test_tasks_of_files(tmp_path: Path, files: dict[str, bytes]) -> None:
    """lm-eval itself, without a network: its accuracy, bits per byte and matches are those worked out by hand."""
    pytest.importorskip("lm_eval")
    model = build()
    reference, text_model = wide(model), TextModel(model, files, quiet=True)
    right, right_norm, total = 0, 0, 0.0
    for question, choices, answer in QUESTIONS:
        p = [scored(reference, *split(text_model.tokenizer, question, choice), 24)[0] for choice in choices]
        right += p.index(max(p)) == answer
        norm = [x / len(choice) for x, choice in zip(p, choices)]
        right_norm += norm.index(max(norm)) == answer
        total += scored(reference, [0], text_model.encode(question), 24)[0]
    said = text_model.continuations([(q[0], {"until": ["\n"], "max_gen_toks": 4}) for q in QUESTIONS])
    folder = write_tasks(tmp_path, [said[0], "no", said[2]])

    found = run_tasks(text_model, find_tasks(["own_*"], folder))["results"]
    assert found["own_choice"]["acc,none"] == pytest.approx(right / 3)
    assert found["own_choice"]["acc_norm,none"] == pytest.approx(right_norm / 3)
    size = sum(len(q[0].encode()) for q in QUESTIONS)
    assert found["own_text"]["bits_per_byte,none"] == pytest.approx(-total / size / 0.6931471805599453, rel=1e-5)
    assert found["own_say"]["exact_match,none"] == pytest.approx(2 / 3)

    limited = run_tasks(text_model, find_tasks(["own_say"], folder), limit=1)
    assert limited["results"]["own_say"]["exact_match,none"] == 1
    assert "own_say" in harness.table(limited)
    with pytest.raises(InputError, match=r"task 'own_chioce' is not one of lm-eval's.*did you mean own_choice"):
        run_tasks(text_model, find_tasks(["own_say", "own_chioce"], folder))
    with pytest.raises(InputError, match=r"--tasks-path .*there is no such folder"):
        run_tasks(text_model, find_tasks(["own_say"], folder / "no"))
    (folder / "questions.jsonl").unlink()
    with pytest.raises(InputError, match=r"data of own_say cannot be had"):
        run_tasks(text_model, find_tasks(["own_say"], folder))
