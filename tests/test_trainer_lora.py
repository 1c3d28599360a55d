"""LoRA against peft on transformers' MPT, and whole runs: what they train, save, resume from and leave."""

import importlib.util
import json
import math
import shutil
from importlib import import_module

import numpy as np
import pytest
import torch
from data_files import write_tokenizer
from launch import launch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from mpt import MptConfig, MptForCausalLM
from mpt.checkpoint import open_checkpoint
from mpt.initialize import init_weights
from mpt.manifest import read_index, read_manifest
from trainer import InputError, load_config, run
from trainer.config import validate
from trainer.lora import TARGETS, LoraConfig, adapters, add_adapters, base_sha256, count_adapters
from trainer.parallel import FsdpConfig, join_world, materialize, shard_model
from trainer.plan import memory, plan, saved_per_adapters, saved_per_block

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
saved_bytes = import_module("test_trainer_plan").saved_bytes

RECIPE = """
run_name: toy
max_seq_len: 48
max_duration: 8ba
global_train_batch_size: 4
device_train_microbatch_size: 2
precision: fp32
device: cpu
log_interval: 1
eval_first: true
eval_interval: 0
save_interval: 4ba
activation_checkpointing: full
model: {pretrained: BASE}
lora: {rank: 4, alpha: 16, dropout: 0.1}
train_loader: {name: finetuning, dataset: {local: DATA, split: train, packing: true}}
eval_loader: {name: finetuning, dataset: {local: DATA, split: val}}
optimizer: {name: decoupled_adamw, lr: 2.0e-2}
scheduler: {name: constant_with_warmup}
loggers: {progress: false}
"""
WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with its tokenizer, and examples whose responses repeat a word of the prompt."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=290, max_seq_len=24)
    MptForCausalLM(config).save_pretrained(folder / "base")
    write_tokenizer(folder / "base", texts=[" ".join(WORDS) * 9], vocab_size=290)
    rng = np.random.default_rng(0)
    for split, n in (("train", 80), ("val", 9)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(n):
                words = rng.choice(WORDS, int(rng.integers(1, 5)))
                file.write(json.dumps({"prompt": f"{' '.join(words)}:", "response": " ".join(words[:1])}) + "\n")
    (folder / "toy.yaml").write_text(RECIPE.replace("BASE", str(folder / "base")).replace("DATA", str(folder)))
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """The folder of a finished run of eight steps."""
    assert run(load_config(folder / "toy.yaml", [f"save_folder={folder / 'done'}"])) == 0
    return folder / "done"


def rows(run_folder):
    """(training losses, evaluation losses)."""
    found = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in found if "loss" in row], [row["eval_loss"] for row in found if "eval_loss" in row]


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_gradients_are_those_of_peft_on_transformers(folder):
    settings = {"r": 3, "lora_alpha": 5, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    theirs = transformers.MptForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings), autocast_adapter_dtype=False).train()
    ours = MptForCausalLM.from_pretrained(folder / "base", dtype=torch.float64).train()
    with torch.device("meta"):
        shape = MptForCausalLM(ours.config)
    config = LoraConfig(rank=3, alpha=5)
    add_adapters(shape, config, base_dtype=torch.float64)
    assert sum(p.numel() for p in adapters(shape).values()) == count_adapters(config, ours.config)
    assert {n for n, p in shape.named_parameters() if p.requires_grad} == adapters(shape).keys()
    weights = dict(theirs.base_model.model.named_parameters())
    for name, parameter in weights.items():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ours = shape.to_empty(device="cpu").train()
    for name, parameter in ours.named_parameters():
        parameter.data = weights[name].detach().clone()
    ids = torch.randint(290, (2, 20))
    losses = [model(input_ids=ids, labels=ids).loss for model in (ours, theirs)]
    assert math.isclose(*(loss.item() for loss in losses), rel_tol=1e-6)
    for loss in losses:
        loss.backward()
    assert len(adapters(ours)) == 2 * 2 * len(TARGETS)
    for name, parameter in ours.named_parameters():
        expected = weights[name].grad
        assert (parameter.grad is None) == (expected is None) == ("lora_" not in name), name
        assert expected is None or relative(parameter.grad, expected) < 1e-5, name


def test_a_run_trains_adapters_and_leaves_the_base(folder, done):
    losses, evaluations = rows(done)
    assert len(losses) == 8 and evaluations[1] < evaluations[0] - 0.1  # a base of random weights
    adapter = load_file(done / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * len(TARGETS)
    base, tuned = (load_file(path / "model.safetensors") for path in (folder / "base", done / "export"))
    assert base.keys() == tuned.keys()
    for name, weight in base.items():
        a, b = (adapter.get(f"base_model.model.{name[:-6]}lora_{part}.weight") for part in "AB")
        if any(target in name for target in TARGETS):
            assert float(b.abs().max()) > 0 and torch.allclose(tuned[name].double(), weight + 4.0 * (b @ a).double())
        else:
            assert a is None and torch.equal(tuned[name], weight), name


def test_peft_and_transformers_compute_the_same(folder, done):
    ids = torch.randint(290, (2, 24))
    ours = MptForCausalLM.from_pretrained(done / "export", dtype=torch.float64)
    merged = transformers.MptForCausalLM.from_pretrained(done / "export", dtype=torch.float64)
    base = transformers.MptForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, done / "adapter").eval()
        expected = adapted(ids).logits
        assert relative(ours(ids).logits, expected) < 1e-5 and relative(merged(ids).logits, expected) < 1e-5
    assert relative(plain, expected) > 0.1
    settings = json.loads((done / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base") and settings["inference_mode"] is True


def test_checkpoints_hold_adapters_and_resume_bit_for_bit(folder, done, tmp_path):
    step = done / "checkpoints" / "step-8"
    names = list(read_index(step, read_manifest(step)).state_dict_metadata)
    assert len(names) == 4 * 2 * 2 * len(TARGETS) and all(".lora_" in name for name in names)  # and AdamW's three
    overrides = [f"save_folder={tmp_path / 'cut'}", "export=false"]
    assert run(load_config(folder / "toy.yaml", [*overrides, "max_duration=4ba"])) == 0
    assert (tmp_path / "cut" / "adapter").exists() and not (tmp_path / "cut" / "export").exists()
    assert run(load_config(folder / "toy.yaml", [f"save_folder={tmp_path / 'cut'}"])) == 0
    assert rows(tmp_path / "cut")[0] == rows(done)[0]
    for file in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (done / file).read_bytes()
    with pytest.raises(InputError, match=rf"another run.*\n  lora.rank: 4 -> 8\n.*load_path={done / 'export'} takes"):
        run(load_config(folder / "toy.yaml", [f"save_folder={done}", "lora.rank=8"]))
    other = MptForCausalLM.from_pretrained(folder / "base")
    other.transformer.blocks[1].ffn.up_proj.weight.data += 1e-3
    other.save_pretrained(tmp_path / "other")
    moved = [f"load_path={tmp_path / 'other'}", f"tokenizer.name={folder / 'base'}", f"save_folder={done}"]
    with pytest.raises(InputError, match=r"belongs to another run.*\n  lora.base_sha256: "):
        run(load_config(folder / "toy.yaml", moved))
    for path in (done, step):
        with pytest.raises(ValueError, match=r"step-8 holds LoRA adapters, not the model .* give the run's export/"):
            open_checkpoint(path)


def test_a_base_in_any_form_is_the_same_base(folder, tmp_path):
    model = MptForCausalLM.from_pretrained(folder / "base")
    model.save_pretrained(tmp_path / "shards", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert base_sha256(str(tmp_path / "shards"), model.config) == base_sha256(str(folder / "base"), model.config)


def test_a_base_in_bf16_computes_what_one_in_fp32_does(folder):
    """FSDP casts weights to bf16 for the blocks; that they are kept so changes nothing."""
    config = MptConfig.from_pretrained(folder / "base")
    ids = torch.randint(290, (2, 24))
    results = []
    with join_world("cpu", FsdpConfig(), 60.0) as world:
        for dtype in (torch.float32, torch.bfloat16):
            with torch.device("meta"):
                model = MptForCausalLM(config)
                add_adapters(model, LoraConfig(rank=4), base_dtype=dtype)
            shard_model(model, world.mesh, FsdpConfig(), bf16=True)
            materialize(model, world.device, cpu_offload=False)
            init_weights(model, 1)
            assert all(p.dtype == torch.float32 for p in adapters(model).values())
            assert model.transformer.wte.weight.dtype == dtype
            for name, parameter in adapters(model).items():
                a = ".lora_A." in name
                limit = parameter.shape[1] ** -0.5 if a else 0.0
                largest = float(parameter.full_tensor().abs().max())
                assert 0.9 * limit <= largest <= limit, name
                if not a:
                    torch.nn.init.constant_(parameter.to_local(), 0.1)
            loss = model.train()(ids, labels=ids).loss
            loss.backward()
            grads = {name: p.grad.full_tensor() for name, p in adapters(model).items()}
            assert isinstance(next(iter(adapters(model).values())), DTensor)
            results.append((float(loss), grads))
    (loss, grads), (same_loss, same_grads) = results
    assert loss == same_loss and all(torch.equal(grad, same_grads[name]) for name, grad in grads.items())


@pytest.mark.slow
def test_ranks_agree(folder, tmp_path):
    """Sharded, replicated, sharing sequences: one curve, and one model."""
    overrides = ["max_duration=4ba", "lora.dropout=0", "fsdp_config.reduce_every_microbatch=true"]
    assert run(load_config(folder / "toy.yaml", [*overrides, f"save_folder={tmp_path / 'one'}"])) == 0
    ways = {"shard": [], "replicate": ["fsdp_config.replicate=2"], "context": ["context_parallel_size=2"]}
    two = [
        {"recipe": str(folder / "toy.yaml"), "overrides": [*overrides, *way, f"save_folder={tmp_path / name}"]}
        for name, way in ways.items()
    ]
    assert launch(2, two, tmp_path / "ranks") == [[0, 0, 0]] * 2
    expected, export = rows(tmp_path / "one"), load_file(tmp_path / "one" / "export" / "model.safetensors")
    for name in ways:
        for ours, theirs in zip(rows(tmp_path / name), expected):
            assert np.allclose(ours, theirs, rtol=1e-5, atol=0), name
        weights = load_file(tmp_path / name / "export" / "model.safetensors")
        assert all(relative(weights[key], weight) < 1e-3 for key, weight in export.items()), name


@pytest.mark.parametrize("targets", [["Wqkv"], ["out_proj", "up_proj"], list(TARGETS)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_as_planned(targets, dropout):
    """What a block keeps, against the tensors that are alive; the frozen layers' inputs may be fewer than assumed."""
    config = MptConfig(d_model=64, n_heads=4, n_layers=3, vocab_size=64, max_seq_len=128)
    lora = LoraConfig(rank=8, dropout=dropout, target_modules=targets)
    fewer = MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=128)

    def block(prepare):
        return saved_bytes(config, "none", 2, prepare) - saved_bytes(fewer, "none", 2, prepare)

    def prepare(model):
        peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_dropout=dropout, target_modules=targets), model)

    planned = saved_per_block(config, 256, 4)["none"] + saved_per_adapters(config, lora, 256, 4)
    assert 0.75 * planned <= block(prepare) <= 1.01 * planned


def test_the_plan_counts_what_trains(folder):
    overrides = ["device=auto", "precision=amp_bf16"]
    config = load_config(folder / "toy.yaml", overrides)
    full = load_config(folder / "toy.yaml", [*overrides, "lora=null"])
    resolved = validate(config, 1)
    model_config, trained = resolved.model_config, count_adapters(config.lora, resolved.model_config)
    numbers, needed = plan(config, resolved, 1), memory(config, resolved.model_config, 1, 2)
    before = memory(full, model_config, 1, 2)
    assert needed["weights"] == 4 * trained + 2 * numbers.parameters
    assert (needed["gradients"], needed["optimizer state"]) == (4 * trained, 8 * trained)
    assert before["gradients"] == 4 * numbers.parameters and sum(needed.values()) < sum(before.values())
    assert f"{trained:,} more train, those of the adapters" in str(numbers)
    assert plan(full, validate(full, 1), 1).adapters is None


def test_it_says_which_gpu_has_room(folder, monkeypatch):
    config = load_config(folder / "toy.yaml", ["device=auto"])
    resolved = validate(config, 1)
    fits = "fits into a GPU of 8 GiB" if resolved.device_bytes is None else "fits into this GPU's"
    assert fits in str(plan(config, resolved, 1))
    module = import_module("trainer.plan")
    monkeypatch.setattr(module, "GPUS", ())
    for size, said in ((2**34, "fits into this GPU's 16.00 GiB"), (2**18, "does not fit into this GPU's 0.2 MiB")):
        one = import_module("dataclasses").replace(resolved, device_bytes=size)
        assert said in str(plan(config, one, 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "lora.target_modules=[Wqkv,q_proj,mlp]",
            "lora.target_modules: q_proj, mlp: no such layer; an MPT's blocks have Wqkv, out_proj, up_proj, down_proj",
        ),
        ("lora.target_modules=[]", "lora.target_modules: no layer is named; an MPT's blocks have Wqkv"),
        ("lora.target_modules=[Wqkv,Wqkv]", "names a layer twice"),
        ("lora.rank=0", "lora.rank=0; expected at least 1"),
        ("lora.rank=32", r"lora.rank=32: Wqkv is 96 x 32, so an adapter of that rank constrains nothing"),
        ("lora.alpha=0", "lora.alpha=0"),
        ("mlp_chunk_size=8", "mlp_chunk_size=8 has no effect with adapters on up_proj or down_proj"),
        ("lora.dropout=1", "lora.dropout=1.*; expected at least 0 and below 1"),
        ("lora.target_module=[Wqkv]", "target_modules"),
    ],
)
def test_bad_settings(folder, override, message):
    with pytest.raises(InputError, match=message):
        validate(load_config(folder / "toy.yaml", [override]), 1)


def test_adapters_need_a_base_and_peft(folder, tmp_path, monkeypatch):
    text = (folder / "toy.yaml").read_text().replace(f"pretrained: {folder / 'base'}", "d_model: 32")
    (tmp_path / "toy.yaml").write_text(text)
    with pytest.raises(InputError, match=r"toy.yaml:\d+: lora trains adapters on a model that is there: name it in"):
        load_config(tmp_path / "toy.yaml")
    shutil.copytree(folder / "base", tmp_path / "base")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"peft is not installed: pip install 'mpt-train\[lora\]', or remove"):
        validate(load_config(folder / "toy.yaml"), 1)
