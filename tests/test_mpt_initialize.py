"""How weights start: the statistics of every scheme, and equal values however the parameters are sharded."""

import math

import pytest
import torch

from mpt import MptConfig, MptForCausalLM, MptModel
from mpt.initialize import init_weights

D, H, L, V = 96, 4, 3, 700
SHAPE = {"d_model": D, "n_heads": H, "n_layers": L, "vocab_size": V, "max_seq_len": 40, "tie_word_embeddings": False}
GQA = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "alibi": False}


def build(init: dict | None, seed: int = 1, **extra) -> dict[str, torch.Tensor]:
    model = MptForCausalLM(MptConfig(**SHAPE, attn_config=GQA, init_config=init, **extra))
    init_weights(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def expect_std(values: torch.Tensor, std: float) -> None:
    """Mean 0 and standard deviation `std`, within 5 standard errors."""
    n = values.numel()
    assert abs(values.mean().item()) < 5 * std / math.sqrt(n)
    assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * n) + 5 / n


RESIDUAL = math.sqrt(2 * L)
BLOCK = "transformer.blocks.1."
# scheme -> (Wqkv's q rows, its k rows, up_proj, embeddings, residual divisor); all (out, in), q is D x D, k is D/2 x D.
SCHEMES = {
    "none": (None, (0.02, 0.02, 0.02, 0.02, 1.0)),
    "kaiming": ({}, (*[math.sqrt(2 / D)] * 4, RESIDUAL)),
    "kaiming uniform": ({"name": "kaiming_uniform_"}, (*[math.sqrt(2 / D)] * 4, RESIDUAL)),
    "fan_out": (
        {"fan_mode": "fan_out", "init_div_is_residual": False},
        (math.sqrt(2 / D), math.sqrt(4 / D), math.sqrt(0.5 / D), math.sqrt(2 / V), 1.0),
    ),
    "tanh": ({"init_nonlinearity": "tanh"}, (*[5 / 3 / math.sqrt(D)] * 4, RESIDUAL)),
    "baseline": ({"name": "baseline_", "init_std": 0.05, "init_div_is_residual": 3}, (*[0.05] * 4, 3.0)),
    "small": ({"name": "small_init_", "init_div_is_residual": "2.5"}, (*[math.sqrt(2 / 5 / D)] * 4, 2.5)),
    "neox": (
        {"name": "neox_init_", "init_div_is_residual": False},
        (*[math.sqrt(2 / 5 / D)] * 4, L / math.sqrt(10)),
    ),
    "xavier": (
        {"name": "xavier_normal_", "init_gain": 0.5},
        (*(0.5 * math.sqrt(2 / (D + out)) for out in (D, D / 2, 4 * D, V)), RESIDUAL),
    ),
    "xavier uniform": (
        {"name": "xavier_uniform_", "init_gain": 2},
        (*(2 * math.sqrt(2 / (D + out)) for out in (D, D / 2, 4 * D, V)), RESIDUAL),
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_statistics(scheme: str) -> None:
    init, (q, k, up, embedding, divisor) = SCHEMES[scheme]
    weights = build(init)
    wqkv = weights[BLOCK + "attn.Wqkv.weight"]
    assert wqkv.shape == (2 * D, D)
    expect_std(wqkv[:D], q)
    expect_std(wqkv[D : D + D // 2], k)
    expect_std(wqkv[D + D // 2 :], k)
    expect_std(weights[BLOCK + "ffn.up_proj.weight"], up)
    expect_std(weights["transformer.wte.weight"], embedding)
    expect_std(weights["lm_head.weight"], embedding)
    expect_std(weights[BLOCK + "attn.out_proj.weight"], q / divisor)
    if scheme not in ("fan_out", "xavier", "xavier uniform"):  # whose down_proj has another fan
        fan = 2 if scheme in ("kaiming", "kaiming uniform", "tanh") else 1  # sqrt(4 D / D): its inputs are 4 D
        expect_std(weights[BLOCK + "ffn.down_proj.weight"], q / fan / divisor)
    if "uniform" in scheme:
        assert wqkv[:D].abs().max() <= math.sqrt(3) * q
    assert torch.equal(weights[BLOCK + "norm_1.weight"], torch.ones(D))


def test_embedding_overrides_and_biases() -> None:
    weights = build({"emb_init_std": 0.3, "emb_init_uniform_lim": 1.0}, no_bias=False)
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"):
        expect_std(weights[name], 0.3)
    assert all(not p.any() for name, p in weights.items() if name.endswith(".bias"))
    weights = build({"emb_init_uniform_lim": 0.5})
    assert 0.49 < weights["transformer.wte.weight"].abs().max() <= 0.5
    weights = build({"emb_init_uniform_lim": [1, 3]})
    assert 1 <= weights["transformer.wte.weight"].min() < 1.01 and 2.99 < weights["transformer.wte.weight"].max() <= 3


def test_default_is_torchs_reset_parameters() -> None:
    weights = build({"name": "default_"}, no_bias=False)
    expect_std(weights["transformer.wte.weight"], 1.0)
    for name, fan_in in (("attn.out_proj", D), ("ffn.down_proj", 4 * D), ("attn.Wqkv", D)):
        for part in ("weight", "bias"):
            values = weights[f"{BLOCK}{name}.{part}"]
            assert 0.9 / math.sqrt(fan_in) < values.abs().max() <= 1 / math.sqrt(fan_in)
    assert torch.equal(weights[BLOCK + "norm_2.weight"], torch.ones(D))
    assert not weights[BLOCK + "norm_2.bias"].any()


def test_values_depend_on_seed_and_name_only() -> None:
    one, again, other = build({}, 5), build({}, 5), build({}, 6)
    for name, p in one.items():
        assert torch.equal(p, again[name])
        if p.dim() == 2:
            assert not torch.equal(p, other[name])
    first, second = (one[f"transformer.blocks.{i}.ffn.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    body = MptModel(MptConfig(**SHAPE, attn_config=GQA, init_config={}))
    init_weights(body, 5)
    for name, p in body.named_parameters():
        assert torch.equal(p, one[f"transformer.{name}"])
    half = MptForCausalLM(MptConfig(**SHAPE, attn_config=GQA, init_config={})).bfloat16()
    init_weights(half, 5)
    for name, p in half.named_parameters():
        assert torch.equal(p, one[name].bfloat16())


def test_blocks_of_rows_are_drawn_apart() -> None:
    """A weight of more than one block: no two blocks alike, and no rows left over."""
    config = MptConfig(**(SHAPE | {"vocab_size": 25_000, "n_layers": 1}))
    model = MptForCausalLM(config)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(torch.nan)
    init_weights(model, 3)
    weight = model.transformer.wte.weight.detach()
    rows = (1 << 20) // D
    assert weight.isfinite().all() and len(weight) > 2 * rows
    assert not torch.equal(weight[:rows], weight[rows : 2 * rows])
    expect_std(weight, 0.02)


def test_constructor_follows_torchs_seed() -> None:
    config = MptConfig(**SHAPE)
    torch.manual_seed(3)
    one, two = MptForCausalLM(config), MptForCausalLM(config)
    torch.manual_seed(3)
    again = MptForCausalLM(config)
    assert torch.equal(one.transformer.wte.weight, again.transformer.wte.weight)
    assert not torch.equal(one.transformer.wte.weight, two.transformer.wte.weight)


def test_init_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MptConfig(**SHAPE, init_device="mixed")
    monkeypatch.setenv("LOCAL_RANK", "1")
    model = MptForCausalLM(config)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match=r"wte\.weight is on the meta device; call model\.to_empty"):
        init_weights(model, 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not any(p.is_meta for p in MptForCausalLM(config).parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in MptForCausalLM(MptConfig(**SHAPE)).parameters())
