"""Whole fine-tunes: gradients with and without packing, what a run starts from and leaves, resuming, ranks."""

import json
import math
import shutil
import signal
from importlib import import_module

import numpy as np
import pytest
import torch
from data_files import write_tokenizer
from launch import launch

from mpt import MptConfig, MptForCausalLM
from scripts import check_run
from trainer import InputError, load_config, run, samples
from trainer.config import validate
from trainer.data.config import DatasetConfig, LoaderConfig
from trainer.data.examples import Encoder
from trainer.data.finetune import open_examples
from trainer.data.templates import Segment
from trainer.metrics import TokenAccuracy

run_module = import_module("trainer.run")

RECIPE = """
run_name: toy
max_seq_len: 48
max_duration: 12ba
global_train_batch_size: 4
device_train_microbatch_size: 2
precision: fp32
device: cpu
log_interval: 1
eval_first: true
eval_interval: 6ba
save_interval: 4ba
model: {pretrained: BASE, resid_pdrop: 0.1}
train_loader: {name: finetuning, dataset: {local: DATA, split: train, packing: true}}
eval_loader: {name: finetuning, dataset: {local: DATA, split: val}}
optimizer: {name: decoupled_adamw, lr: 1.0e-2}
scheduler: {name: linear_decay_with_warmup, t_warmup: 2ba}
loggers: {progress: false}
"""
WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with its tokenizer, and examples whose responses repeat a word of the prompt."""
    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=290, max_seq_len=24)
    MptForCausalLM(config).save_pretrained(folder / "base")
    write_tokenizer(folder / "base", texts=[" ".join(WORDS) * 9], vocab_size=290)
    rng = np.random.default_rng(0)
    for split, n in (("train", 120), ("val", 13)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(n):
                words = rng.choice(WORDS, int(rng.integers(1, 5)))
                file.write(json.dumps({"prompt": f"{' '.join(words)}:", "response": " ".join(words[:1])}) + "\n")
    (folder / "toy.yaml").write_text(RECIPE.replace("BASE", str(folder / "base")).replace("DATA", str(folder)))
    return folder


def rows(run_folder):
    """(training losses, evaluation rows) by step."""
    found = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in found if "loss" in row]
    return losses, {row["step"]: row for row in found if "eval_loss" in row}


@pytest.mark.parametrize("alibi_bias_max", [8, 16])
def test_packed_and_unpacked_give_the_same_gradients(folder, alibi_bias_max):
    config = MptConfig(d_model=48, n_heads=6, n_layers=2, vocab_size=290)
    config.attn_config.alibi_bias_max = alibi_bias_max
    torch.manual_seed(1)
    model = MptForCausalLM(config).train()
    gradients = []
    for packing in (True, False):
        model.config.attn_config.attn_uses_sequence_id = packing
        model.zero_grad()
        loader = LoaderConfig(
            name="finetuning", dataset=DatasetConfig(local=str(folder), split="train", packing=packing)
        )
        data = open_examples(loader, seq_len=48, global_batch_size=10, seed=1, vocab_size=290,
                             tokenizer=folder / "base" / "tokenizer.json", training=True)  # fmt: skip
        counted = 0
        for planes, valid in data.eval_batches(0, 1, 10):
            arguments = data.arguments(planes[:valid], sequence_id=packing, prefix_mask=False)
            batch = {name: torch.from_numpy(value) for name, value in arguments.items()}
            counted += int((batch["labels"][:, 1:] != -100).sum())
            model(**batch, num_items_in_batch=100).loss.backward()
        gradients.append((counted, data.sequences, {n: p.grad.double().clone() for n, p in model.named_parameters()}))
    (packed_labels, packed_rows, packed), (labels, n, unpacked) = gradients
    assert packed_labels == labels and packed_rows < n / 3
    for name, grad in unpacked.items():
        assert float((packed[name] - grad).abs().max() / grad.abs().max()) < 1e-5, name


def test_a_fine_tune_from_a_folder(folder, tmp_path, capsys, recwarn):
    out = tmp_path / "run"
    assert run(load_config(folder / "toy.yaml", [f"save_folder={out}"])) == 0
    log = capsys.readouterr().out
    for said in (
        "note          load_path's resid_pdrop: 0.0 -> 0.1",
        "note          dataset.packing: attn_config.attn_uses_sequence_id is true in training; the export keeps false",
        "of up to 48, on average",
        "train: 120 of 120 examples",
        "token efficiency 9",
        "held out: ",
        "token accuracy",
        "answer: ",
    ):
        assert said in log, said
    losses, evaluations = rows(out)
    assert list(evaluations) == [0, 6, 12] and len(losses) == 12
    assert evaluations[12]["eval_loss"] < evaluations[0]["eval_loss"] - 1
    base = MptForCausalLM.from_pretrained(folder / "base")
    tuned = MptForCausalLM.from_pretrained(out / "export")
    assert tuned.config.attn_config.attn_uses_sequence_id is False and tuned.config.max_seq_len == 48
    for model, step in ((base, 0), (tuned, 12)):
        loss, accuracy = judged(model, folder)
        assert math.isclose(evaluations[step]["eval_loss"], loss, rel_tol=1e-5)
        assert math.isclose(evaluations[step]["eval_token_accuracy"], accuracy, rel_tol=1e-9)
    assert check_run.main([str(out)]) == 0 and check_run.main([str(out), "--margin", "50"]) == 1
    from_the_run = validate(load_config(folder / "toy.yaml", [f"model.pretrained={out}"]), 1)  # its last checkpoint
    assert from_the_run.tokenizer_path == out / "export" / "tokenizer.json"
    assert from_the_run.model_config.attn_config.attn_uses_sequence_id is True
    page = (out / "samples.md").read_text()
    first = json.loads((folder / "val.jsonl").read_text().splitlines()[0])
    assert page.startswith("# toy after step 12\n") and page.count("## Prompt") == 3
    assert f"    {first['prompt']}\n" in page and f"    {first['response']}\n" in page
    tokens = sum(json.loads(line)["tokens"] for line in (out / "metrics.jsonl").read_text().splitlines()[-1:])
    assert 0.9 * 12 * 4 * 48 < tokens < 12 * 4 * 48  # padding is not counted


def judged(model, folder):
    """(mean loss, share of right tokens) on the held-out responses, one example at a time in float64."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    losses, right = [], []
    for line in (folder / "val.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, response = (tokenizer.encode(row[key]).ids for key in ("prompt", "response"))
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response, 0]])).logits[0, len(prompt) - 1 : -1].double()
        wanted = torch.tensor([*response, 0])
        losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
        right += (logits.argmax(-1) == wanted).tolist()
    return float(np.mean(losses)), float(np.mean(right))


def test_it_resumes_bit_for_bit_and_ranks_agree(folder, tmp_path):
    recipe = str(folder / "toy.yaml")
    whole, cut, two = (["max_duration=7ba", f"save_folder={tmp_path / name}"] for name in ("whole", "cut", "two"))
    (codes,) = launch(
        1,
        [
            {"recipe": recipe, "overrides": whole},
            {"recipe": recipe, "overrides": cut, "signal": signal.SIGTERM, "after": 3},
            {"recipe": recipe, "overrides": cut},
        ],
        tmp_path / "one-rank",
    )
    assert codes == [0, 143, 0]
    losses, evaluations = rows(tmp_path / "whole")
    assert rows(tmp_path / "cut") == (losses, evaluations)
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]

    without_dropout = ["model.resid_pdrop=0", "eval_loader.dataset.packing=true", *two]
    sharing = [*without_dropout, "context_parallel_size=2", f"save_folder={tmp_path / 'sharing'}"]
    recipes = [{"recipe": recipe, "overrides": overrides} for overrides in (without_dropout, sharing)]
    assert launch(2, recipes, tmp_path / "two-ranks") == [[0, 0], [0, 0]]
    assert run(load_config(recipe, [*without_dropout, f"save_folder={tmp_path / 'one'}"])) == 0
    ours, evaluations = rows(tmp_path / "one")
    base = judged(MptForCausalLM.from_pretrained(folder / "base"), folder)
    assert np.allclose((evaluations[0]["eval_loss"], evaluations[0]["eval_token_accuracy"]), base, rtol=1e-5)
    for name in ("two", "sharing"):
        theirs, their_evaluations = rows(tmp_path / name)
        assert np.allclose(ours, theirs, rtol=1e-5, atol=0)
        for step, row in evaluations.items():
            assert math.isclose(row["eval_loss"], their_evaluations[step]["eval_loss"], rel_tol=1e-5)
            assert row["eval_token_accuracy"] == their_evaluations[step]["eval_token_accuracy"]
            assert row["tokens"] == their_evaluations[step]["tokens"]
        assert (tmp_path / "one" / "samples.md").read_text() == (tmp_path / name / "samples.md").read_text()


def test_accuracy_counts_in_chunks(folder, monkeypatch):
    model = MptForCausalLM.from_pretrained(folder / "base")
    ids = torch.randint(290, (3, 40))
    labels = ids.masked_fill(torch.rand(3, 40) < 0.5, -100)
    monkeypatch.setattr(TokenAccuracy, "CHUNK", 290 * 7)
    with TokenAccuracy(model) as accuracy, torch.no_grad():
        accuracy.expect(labels)
        logits = model(ids).logits
    assert accuracy.correct == int((logits[:, :-1].argmax(-1) == labels[:, 1:]).sum())
    model(ids)  # no longer counted, nor in need of labels


def test_answers_end_where_the_marker_is_text(folder, monkeypatch):
    """A tokenizer without <|im_end|> spells it, and a model that goes on from there speaks for the user."""
    encoder = Encoder(folder / "base" / "tokenizer.json")
    (said,) = encoder.encode([[Segment(("one two<|im_end|>\n<|im_start|>user\nthree",), True)]])
    model = MptForCausalLM.from_pretrained(folder / "base")
    prompt = samples.Question((1, 2), "", None)
    monkeypatch.setattr(model, "generate", lambda ids, *_, **__: torch.cat((ids, torch.tensor(said)), 1))
    assert samples.answer(model, [prompt], encoder, 99) == ["one two"]


def test_a_base_without_a_tokenizer_needs_one_named(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer.json"))
    overrides = [f"model.pretrained={tmp_path / 'base'}"]
    with pytest.raises(InputError, match=r"tokenizer.name is required to tokenise examples"):
        validate(load_config(folder / "toy.yaml", overrides), 1)
    overrides += [f"tokenizer.name={folder / 'base'}"]
    assert validate(load_config(folder / "toy.yaml", overrides), 1).train_data.sequences > 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pretrained=nowhere/at/all", "argument 'model.pretrained=nowhere/at/all': .* does not exist; give"),
        ("model.pretrained=DATA", "holds neither model.safetensors nor"),
        ("model.n_layers=3", "does not fit the model"),
        ("sample_prompt=x", "sample_prompt is for a train_loader of name: text"),
        ("tokenizer.name=nowhere.json", "tokenizer nowhere.json: no such file"),
        ("train_loader.dataset.template={question}", "train.jsonl, line 1: the template needs the field 'question'"),
        ("train_loader.dataset.too_long=keep", "too_long: expected one of drop, cut"),
        ("train_loader.name=text", r"toy.yaml:14: train_loader.dataset.packing is for a loader"),
    ],
)
def test_what_a_run_would_stumble_over_is_said_first(folder, override, message):
    with pytest.raises(InputError, match=message):
        validate(load_config(folder / "toy.yaml", [override.replace("DATA", str(folder))]), 1)
