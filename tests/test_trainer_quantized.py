"""Frozen layers in 4 and 8 bit: products against the weights that they stand for, and whole runs with adapters."""

import importlib.util
import json
from importlib import import_module

import numpy as np
import pytest
import torch
from launch import launch
from safetensors.torch import load_file
from torch import nn

from mpt import MptConfig, MptForCausalLM
from mpt.checkpoint import open_checkpoint
from trainer import InputError, load_config, run
from trainer.config import RECIPES, build_model_config, validate
from trainer.lora import TARGETS, LoraConfig, adapters, add_adapters
from trainer.plan import memory, plan
from trainer.quantized import QuantizedLinear, load_quantized, stored_bytes

lora = import_module("test_trainer_lora")
folder, relative, rows = lora.folder, lora.relative, lora.rows

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
BITS = pytest.mark.parametrize("bits", [4, 8])


@needs_bitsandbytes
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(192, 64), (96, 33)])
@torch.compiler.set_stance("force_eager")  # bitsandbytes compiles for odd shapes, for longer than all else here takes
def test_a_product_is_that_of_the_whole_weight(bits, dtype, shape):
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    quantized = QuantizedLinear(layer, bits)
    with pytest.raises(RuntimeError, match="used before its weight is loaded"):
        quantized(torch.zeros(1, shape[1], dtype=dtype))
    weight = torch.randn(shape)
    quantized.load(weight)
    whole = quantized.weight(dtype)
    error = (whole.float() - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert whole.shape == shape and whole.dtype == dtype and 0.001 < error < {4: 0.12, 8: 0.02}[bits]
    x = torch.randn(2, 5, shape[1], dtype=dtype, requires_grad=True)
    out = quantized(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert torch.equal(out, x @ whole.T + layer.bias)
    assert torch.allclose(x.grad, grad @ whole, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert not list(quantized.buffers()) and [name for name, _ in quantized.named_parameters()] == ["bias"]


@needs_bitsandbytes
@BITS
@pytest.mark.parametrize("targets", [["Wqkv"], list(TARGETS)])
def test_a_model_computes_with_the_weights_that_its_layers_stand_for(folder, bits, targets):
    """Logits and the adapters' gradients, against the same model with those weights in plain layers."""
    config = MptConfig.from_pretrained(folder / "base")
    models = []
    for base_bits in (bits, None):
        with torch.device("meta"):
            model = MptForCausalLM(config)
            add_adapters(
                model, LoraConfig(rank=4, target_modules=targets, base_bits=base_bits), base_dtype=torch.float32
            )
        models.append(model.to_empty(device="cpu").train())
    ours, plain = models
    rest = load_quantized(ours, open_checkpoint(folder / "base"))
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 2 * len(TARGETS) and not any("proj" in name or "Wqkv" in name for name in rest.tensors)
    weights = {f"{name}.weight": layer.weight(torch.float32) for name, layer in layers.items()}
    for name, parameter in ours.named_parameters():
        weights[name] = rest.tensors[name].rows(0, 10**6) if name in rest.tensors else torch.randn(parameter.shape) / 10
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    ids = torch.randint(290, (2, 24))
    outputs = [model(ids, return_logits=True, labels=ids) for model in models]
    assert relative(outputs[0].logits, outputs[1].logits) < 1e-5
    for out in outputs:
        out.loss.backward()
    for name, parameter in adapters(ours).items():
        assert relative(parameter.grad, adapters(plain)[name].grad) < 1e-4, name


@needs_bitsandbytes
@BITS
def test_a_run_trains_saves_resumes_and_leaves_what_others_do(folder, tmp_path, bits):
    overrides = [f"lora.base_bits={bits}", "max_duration=6ba", "save_interval=3ba"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(load_config(folder / "toy.yaml", [*overrides, f"save_folder={whole}"])) == 0
    losses, evaluations = rows(whole)
    assert evaluations[1] < evaluations[0] - 0.1
    names = load_file(whole / "adapter" / "adapter_model.safetensors").keys()
    assert len(names) == 2 * 2 * len(TARGETS)
    # Merged with the model as it was, not with what its few bits stand for.
    base, tuned = (load_file(path / "model.safetensors") for path in (folder / "base", whole / "export"))
    assert base.keys() == tuned.keys() and torch.equal(base["transformer.wte.weight"], tuned["transformer.wte.weight"])
    adapter = load_file(whole / "adapter" / "adapter_model.safetensors")
    name = "transformer.blocks.1.ffn.up_proj."
    a, b = (adapter[f"base_model.model.{name}lora_{part}.weight"] for part in "AB")
    assert torch.allclose(tuned[f"{name}weight"], base[f"{name}weight"] + 4.0 * (b @ a), atol=1e-6)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["parameters"] == sum(t.numel() for t in base.values()) + sum(t.numel() for t in adapter.values())

    assert run(load_config(folder / "toy.yaml", [*overrides, f"save_folder={cut}", "max_duration=3ba"])) == 0
    assert run(load_config(folder / "toy.yaml", [*overrides, f"save_folder={cut}"])) == 0
    assert rows(cut)[0] == losses
    with pytest.raises(InputError, match=rf"belongs to another run.*\n  lora.base_bits: {bits} -> None"):
        run(load_config(folder / "toy.yaml", [*overrides, f"save_folder={cut}", "lora.base_bits=null"]))


@needs_bitsandbytes
@pytest.mark.slow
def test_ranks_agree(folder, tmp_path):
    """Every rank holds the quantized layers whole; adapters and embeddings are sharded."""
    overrides = ["lora.base_bits=4", "max_duration=4ba", "lora.dropout=0"]
    assert run(load_config(folder / "toy.yaml", [*overrides, f"save_folder={tmp_path / 'one'}"])) == 0
    recipes = [
        {"recipe": str(folder / "toy.yaml"), "overrides": [*overrides, *way, f"save_folder={tmp_path / name}"]}
        for name, way in {"shard": [], "context": ["context_parallel_size=2"]}.items()
    ]
    assert launch(2, recipes, tmp_path / "ranks") == [[0, 0]] * 2
    for name in ("shard", "context"):
        for ours, theirs in zip(rows(tmp_path / name), rows(tmp_path / "one")):
            assert np.allclose(ours, theirs, rtol=1e-5, atol=0), name


@needs_bitsandbytes
@BITS
def test_bytes_are_those_of_what_is_kept(bits):
    layer = QuantizedLinear(nn.Linear(512, 1024, bias=False), bits)
    layer.load(torch.randn(1024, 512))
    numbers, state = layer._quantized
    kept = numbers.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if bits == 4 else 0)
    assert kept == stored_bytes(1024 * 512, bits)


@BITS
def test_the_plan_counts_bits(folder, bits):
    overrides = ["device=auto", "precision=amp_bf16"]
    config = load_config(folder / "toy.yaml", [*overrides, f"lora.base_bits={bits}"])
    whole = load_config(folder / "toy.yaml", overrides)
    model_config = MptConfig.from_dict(whole.model | {"max_seq_len": 48})
    d, blocks = 32, 2
    layers = 3 * d * d + d * d + 2 * 4 * d * d
    needed, before = (memory(c, model_config, 2, 2) for c in (config, whole))
    saved = before["weights"] - needed["weights"]
    # Half of the layers in bf16 was on each of two processes; all of their bits are now.
    assert saved == blocks * (layers * 2 // 2 - sum(stored_bytes(n * d * d, bits) for n in (3, 1, 4, 4)))
    assert before["gathered weights"] - needed["gathered weights"] == 2 * blocks * layers
    assert needed["one block's work"] - before["one block's work"] == 2 * 4 * d * d


def test_7b_in_4_bit_is_planned_for_one_gpu_of_16_gib(tmp_path, monkeypatch):
    """With room to spare; the plan of the same run without it names the setting."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build_model_config(load_config(RECIPES / "mpt-7b.yaml")).save_pretrained(tmp_path)
    overrides = [f"model.pretrained={tmp_path}", "max_duration=1000ba", "eval_interval=0", "save_interval=0"]
    for bits, gib in ((8, 12), (4, 8)):
        config = load_config(RECIPES / "mpt-7b-lora.yaml", [*overrides, f"lora.base_bits={bits}"])
        assert f"fits into a GPU of {gib} GiB" in str(plan(config, validate(config, 1, open_data=False), 1))
    config = load_config(RECIPES / "mpt-7b-lora.yaml", overrides)
    assert "with lora.base_bits=4" in str(plan(config, validate(config, 1, open_data=False), 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.base_bits=5"], "lora.base_bits=5; expected 4, 8 or null"),
        (["lora.base_bits=4", "fsdp_config.cpu_offload=true"], "lora.base_bits=4 keeps the model on the GPU, and fsdp"),
        (
            ["lora.base_bits=8", "mlp_chunk_size=8", "lora.target_modules=[Wqkv]"],
            "mlp_chunk_size=8 has no effect .* nor with lora.base_bits",
        ),
    ],
)
def test_bad_settings(folder, overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(folder / "toy.yaml", overrides)


def test_it_needs_bitsandbytes(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(InputError, match=r"bitsandbytes is not installed: pip install 'mpt-train\[quantize\]', or"):
        validate(load_config(folder / "toy.yaml", ["lora.base_bits=4"]), 1)
