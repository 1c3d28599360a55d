"""Every field of the configuration against a second implementation in float64, written here from the specification.

It shares no code with the model: loops over heads, whole score matrices, plain autograd. Forward, loss, all gradients.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpt import MptConfig, MptForCausalLM
from mpt.model import AttentionRules

B, S = 3, 13
SHAPE = {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 16}


def slopes(heads: int, bias_max: float) -> list[float]:
    n = 2 ** math.ceil(math.log2(heads))
    s = [2 ** (-i * bias_max / n) for i in range(1, n + 1)]
    return s if n == heads else (s[1::2] + s[::2])[:heads]


def norm(x: Tensor, w: dict[str, Tensor], name: str, c: dict) -> Tensor:
    if "rms" in c["norm_type"]:
        return x / (x.pow(2).mean(-1, keepdim=True) + c["layer_norm_epsilon"]).sqrt() * w[f"{name}.weight"]
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + c["layer_norm_epsilon"]).sqrt() * w[f"{name}.weight"]
    return x + w[f"{name}.bias"] if f"{name}.bias" in w else x


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def attention(x: Tensor, w: dict[str, Tensor], name: str, c: dict, sees: Tensor) -> tuple[Tensor, Tensor]:
    """Output of out_proj, and the probabilities (B, H, S, S). sees: (B, S, S)."""
    a, d, heads = c["attn_config"], c["d_model"], c["n_heads"]
    width = d // heads
    groups = {"multihead_attention": heads, "multiquery_attention": 1}.get(a["attn_type"], a.get("kv_n_heads"))
    qkv = linear(x, w, f"{name}.Wqkv")
    if a["clip_qkv"]:
        qkv = torch.where(qkv.abs() > a["clip_qkv"], qkv.sign() * a["clip_qkv"], qkv)
    q, k, v = qkv[..., :d], qkv[..., d : d + groups * width], qkv[..., d + groups * width :]
    if a["qk_ln"]:
        q, k = norm(q, w, f"{name}.q_ln", c), norm(k, w, f"{name}.k_ln", c)
    outs, probabilities = [], []
    for h in range(heads):
        g = h // (heads // groups)
        qh = q[..., h * width : (h + 1) * width]
        kh, vh = (t[..., g * width : (g + 1) * width] for t in (k, v))
        scores = qh @ kh.transpose(1, 2) * (1 / math.sqrt(width) if a["softmax_scale"] is None else a["softmax_scale"])
        if a["alibi"]:
            for i in range(x.shape[1]):
                bias = [-slopes(heads, a["alibi_bias_max"])[h] * abs(i - j) for j in range(x.shape[1])]
                scores = scores + F.one_hot(torch.tensor(i), x.shape[1])[:, None] * torch.tensor(bias)
        weights = torch.where(sees, scores.exp(), 0.0)
        p = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        probabilities.append(p)
        outs.append(p @ vh)
    return linear(torch.cat(outs, -1), w, f"{name}.out_proj"), torch.stack(probabilities, 1)


def oracle(
    w: dict[str, Tensor],
    c: dict,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
    prefix_mask: Tensor | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    a, (rows, length) = c["attn_config"], ids.shape
    real = torch.ones(rows, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    x = w["transformer.wte.weight"][ids]
    if not a["alibi"] and c["learned_pos_emb"]:
        positions = torch.stack([(r.cumsum(0) - 1).clamp(min=0) for r in real.int()])
        x = x + w["transformer.wpe.weight"][positions]
    if x.requires_grad:
        x.register_hook(lambda g: g * c["embedding_fraction"])
    sees = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, -1, -1)
    if a["prefix_lm"]:
        sees = sees | prefix_mask.bool()[:, None, :]
    sees = sees & real[:, None, :]
    if a["attn_uses_sequence_id"] and sequence_id is not None:
        sees = sees & (sequence_id[:, :, None] == sequence_id[:, None, :]) & (sequence_id != -1)[:, None, :]
    hidden, attentions = [], []
    for i in range(c["n_layers"]):
        hidden.append(x)
        name = f"transformer.blocks.{i}"
        out, p = attention(norm(x, w, f"{name}.norm_1", c), w, f"{name}.attn", c, sees)
        attentions.append(p)
        x = x + out
        up = linear(norm(x, w, f"{name}.norm_2", c), w, f"{name}.ffn.up_proj")
        x = x + linear(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))), w, f"{name}.ffn.down_proj")
    x = norm(x, w, "transformer.norm_f", c)
    logits = x @ w.get("lm_head.weight", w["transformer.wte.weight"]).T
    scale = c["logit_scale"]
    if scale is not None:
        logits = logits * (1 / math.sqrt(c["d_model"]) if scale == "inv_sqrt_d_model" else scale)
    return {"logits": logits, "hidden_states": [*hidden, x], "attentions": attentions}


def close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    assert (ours - theirs).abs().max() <= 1e-8 * theirs.abs().max() + 1e-12, what


GQA = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
FIELDS = {
    "defaults": ({}, {}),
    "heads 3": ({}, {"n_heads": 3}),
    "heads 6, alibi_bias_max 16": ({"alibi_bias_max": 16}, {"n_heads": 6}),
    "expansion_ratio": ({}, {"expansion_ratio": 2.5}),
    "gqa": (GQA, {}),
    "mqa": ({"attn_type": "multiquery_attention"}, {"n_heads": 6}),
    "softmax_scale": ({"softmax_scale": 0.5}, {}),
    "clip_qkv": ({"clip_qkv": 0.4}, {}),
    "qk_ln": ({"qk_ln": True}, {}),
    "qk_ln, clip, gqa, biases": ({"qk_ln": True, "clip_qkv": 1, **GQA}, {"no_bias": False}),
    "prefix_lm": ({"prefix_lm": True}, {}),
    "prefix_lm, learned": ({"prefix_lm": True, "alibi": False}, {}),
    "sequence ids": ({"attn_uses_sequence_id": True}, {}),
    "sequence ids, prefix, mqa": (
        {"attn_uses_sequence_id": True, "prefix_lm": True, "attn_type": "multiquery_attention"},
        {},
    ),
    "learned positions": ({"alibi": False}, {}),
    "learned, sequence ids": ({"alibi": False, "attn_uses_sequence_id": True}, {}),
    "no positions": ({"alibi": False}, {"learned_pos_emb": False}),
    "alibi beyond max_seq_len": ({}, {"max_seq_len": 5}),
    "embedding_fraction": ({}, {"embedding_fraction": 0.1}),
    "embedding_fraction, learned, untied": (
        {"alibi": False},
        {"embedding_fraction": 0.3, "tie_word_embeddings": False},
    ),
    "logit_scale": ({}, {"logit_scale": 3}),
    "logit_scale inv_sqrt": ({}, {"logit_scale": "inv_sqrt_d_model", "tie_word_embeddings": False}),
    "biases": ({}, {"no_bias": False}),
    "layernorm": ({}, {"norm_type": "layernorm", "layer_norm_epsilon": 0.1}),
    "rmsnorm": ({}, {"norm_type": "rmsnorm", "layer_norm_epsilon": 1}),
    "rmsnorm, biases, qk_ln": ({"qk_ln": True}, {"norm_type": "low_precision_rmsnorm", "no_bias": False}),
    "everything": (
        {
            "qk_ln": True,
            "clip_qkv": 1.5,
            "softmax_scale": 0.3,
            "alibi_bias_max": 4,
            "attn_uses_sequence_id": True,
            **GQA,
        },
        {"no_bias": False, "logit_scale": 0.5, "embedding_fraction": 0.5, "expansion_ratio": 1.5},
    ),
}
PADDING = {"none": (0, 0, 0), "left": (0, -4, -S + 1), "right": (0, 4, S - 1)}


def model_and_weights(attn: dict, extra: dict) -> tuple[MptForCausalLM, dict[str, Tensor], dict]:
    config = MptConfig(**(SHAPE | extra), attn_config=attn)
    model = MptForCausalLM(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():  # livelier than any initialisation: norms and biases matter too
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 0.5) + (name.endswith("norm_1.weight")))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return model, weights, config.to_dict()


def inputs(c: dict, padding: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """ids, masks, and labels that count at real positions only (and not at a row's first)."""
    ids = torch.randint(0, c["vocab_size"], (B, S))
    real = torch.ones(B, S, dtype=torch.long)
    for row, amount in enumerate(PADDING[padding]):
        if amount > 0:
            real[row, S - amount :] = 0
        elif amount < 0:
            real[row, :-amount] = 0
    masks = {} if padding == "none" else {"attention_mask": real}
    if c["attn_config"]["prefix_lm"]:
        masks["prefix_mask"] = torch.arange(S).expand(B, S) < torch.tensor([[0], [5], [S]])
    if c["attn_config"]["attn_uses_sequence_id"]:
        masks["sequence_id"] = (torch.arange(S).expand(B, S) >= torch.tensor([[4], [6], [S]])).long()
    labels = ids.masked_fill(real == 0, -100)
    labels[torch.arange(B), real.argmax(1)] = -100
    return ids, masks, labels


@pytest.mark.filterwarnings("ignore:attn_config.alibi and learned_pos_emb")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("field", FIELDS)
def test_field(field: str, padding: str) -> None:
    model, weights, c = model_and_weights(*FIELDS[field])
    ids, masks, labels = inputs(c, padding)
    real = masks.get("attention_mask", torch.ones(B, S)).bool()
    out = model(ids, labels=labels, return_logits=True, output_hidden_states=True, output_attentions=True, **masks)
    expected = oracle(weights, c, ids, **masks)
    close(out.logits[real], expected["logits"][real], "logits")
    assert len(out.hidden_states) == c["n_layers"] + 1 and len(out.attentions) == c["n_layers"]
    for ours, theirs in zip(out.hidden_states, expected["hidden_states"], strict=True):
        close(ours[real], theirs[real], "hidden_states")
    for ours, theirs in zip(out.attentions, expected["attentions"], strict=True):
        close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], "attentions")

    loss = F.cross_entropy(expected["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(out.loss, loss, "loss")
    out.loss.backward()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        close(p.grad, weights[name].grad, name)


@pytest.mark.parametrize("impl", ["torch", "flash", "triton"])
def test_attn_impl_changes_nothing(impl: str) -> None:
    torch.manual_seed(0)
    model, weights, c = model_and_weights({"attn_impl": impl}, {})
    ids = torch.randint(0, 61, (B, S))
    close(model(ids).logits, oracle(weights, c, ids)["logits"])


def test_sequence_ids_of_minus_one_are_padding() -> None:
    """Real tokens never see them, without an attention_mask; learned positions count from the first real token."""
    for attn in ({"attn_uses_sequence_id": True}, {"attn_uses_sequence_id": True, "alibi": False}):
        model, weights, c = model_and_weights(attn, {})
        ids = torch.randint(0, 61, (2, S))
        sequence_id = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 4, [-1] * 3 + [0] * 10])
        out = model(ids, token_type_ids=sequence_id)
        real = sequence_id >= 0
        expected = oracle(weights, c, ids, attention_mask=real, sequence_id=sequence_id)
        close(out.logits[real], expected["logits"][real])
        assert out.logits.isfinite().all()


def test_padding_is_finite_and_changes_nothing() -> None:
    """A padded row equals its unpadded run; a row of padding only stays finite, in loss and gradients too."""
    for attn in ({}, {"alibi": False}, {"qk_ln": True, **GQA}):
        model = model_and_weights(attn, {})[0].eval()
        ids, mask = torch.randint(0, 61, (3, S)), torch.ones(3, S, dtype=torch.long)
        mask[0, :5], mask[1, 8:], mask[2, :] = 0, 0, 0
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        out.loss.backward()
        close(out.logits[0, 5:], model(ids[:1, 5:]).logits[0])
        close(out.logits[1, :8], model(ids[1:2, :8]).logits[0])
        assert out.logits.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_embedding_dropout() -> None:
    model, _, _ = model_and_weights({}, {"emb_pdrop": 0.25, "d_model": 64})
    ids = torch.randint(0, 61, (8, 50))
    plain = model.transformer.wte(ids)
    x = model.train()(ids, output_hidden_states=True).hidden_states[0]
    dropped = x == 0
    assert 0.2 < dropped.double().mean() < 0.3
    close(x[~dropped], plain[~dropped] / 0.75)
    close(model.eval()(ids, output_hidden_states=True).hidden_states[0], plain)


def test_residual_dropout() -> None:
    """Each branch is zero with probability p, or scaled by 1/(1-p), before it is added."""
    model, _, _ = model_and_weights({}, {"resid_pdrop": 0.25, "d_model": 64})
    ids = torch.randint(0, 61, (8, 50))
    block = model.transformer.blocks[0]
    for silent in (block.attn.out_proj, block.ffn.down_proj):  # leave one branch at a time
        kept = silent.weight.detach().clone()
        with torch.no_grad():
            silent.weight.zero_()
        x, y = model.eval()(ids, output_hidden_states=True).hidden_states[:2]
        a, b = model.train()(ids, output_hidden_states=True).hidden_states[:2]
        dropped = b == a
        assert 0.2 < dropped.double().mean() < 0.3
        close((b - a)[~dropped], (y - x)[~dropped] / 0.75)
        with torch.no_grad():
            silent.weight.copy_(kept)


def test_attention_dropout() -> None:
    """Of the probabilities only: with constant values, the output is the sum of what is kept, over 1 - p."""
    model, _, _ = model_and_weights({"attn_pdrop": 0.25, "alibi": False}, {"no_bias": False, "n_layers": 1})
    attn = model.transformer.blocks[0].attn
    with torch.no_grad():
        attn.Wqkv.weight.zero_()
        attn.Wqkv.bias.zero_()
        attn.Wqkv.bias[-48:] = 1.0
        attn.out_proj.weight.copy_(torch.eye(48))
        attn.out_proj.bias.zero_()
    x = torch.randn(40, 16, 48, dtype=torch.float64)
    rules = AttentionRules()
    out = attn.train()(x, rules)[:, -1, ::12]  # one per row and head: kept / (16 * 0.75)
    kept = out * 12
    close(kept, kept.round())
    assert abs(kept.mean() / 16 - 0.75) < 5 * math.sqrt(0.75 * 0.25 / (40 * 4 * 16))
    close(attn.eval()(x, rules), torch.ones_like(x))
