"""The models as their users meet them: parity with transformers, outputs, autocast, compile, and what they refuse."""

import copy

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, size
from tolerance import Row, hold
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import MptConfig as TheirConfig
from transformers import MptForCausalLM as TheirModel

import kernels
from mpt import MptCache, MptConfig, MptForCausalLM, MptModel
from mpt.config import parameter_shapes
from mpt.model import MptLinear

SHAPE = {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": 97, "max_seq_len": 40}
S = 33


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def pair(**attn) -> tuple[MptForCausalLM, TheirModel]:
    """Ours and transformers', with the same lively weights."""
    theirs = TheirModel(TheirConfig(**SHAPE, attn_config=attn))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.3) + (p.dim() == 1))
    ours = MptForCausalLM(MptConfig(**SHAPE, attn_config=attn))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("attn", [{}, {"clip_qkv": 0.5, "softmax_scale": 0.2}], ids=["plain", "clip and scale"])
def test_equals_transformers(attn: dict, padding: str) -> None:
    ours, theirs = pair(**attn)
    ids, mask = torch.randint(0, 97, (3, S)), torch.ones(3, S, dtype=torch.long)
    labels = ids.clone()
    if padding == "left":
        mask[0, :7], mask[1, :20] = 0, 0
        labels[0, 7], labels[1, 20] = -100, -100  # predicted at a padded position, where outputs are unspecified
    elif padding == "right":
        mask[0, -7:], mask[1, -20:] = 0, 0
    labels[mask == 0] = -100
    a = ours(ids, attention_mask=mask, labels=labels, return_logits=True)
    b = theirs(ids, attention_mask=mask, labels=labels)
    assert relative(a.logits[mask == 1], b.logits[mask == 1]) <= 1e-5
    assert relative(a.loss, b.loss) <= 1e-5
    a.loss.backward()
    b.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert relative(p.grad, gradients[name].grad) <= 1e-5, name


def test_outputs_equal_transformers() -> None:
    ours, theirs = (m.eval() for m in pair())
    ids = torch.randint(0, 97, (2, S))
    flags = {"output_hidden_states": True, "output_attentions": True}
    a, b = ours(ids, labels=ids, **flags), theirs(ids, labels=ids, **flags)
    assert list(a.keys()) == [key for key in b if key != "past_key_values"]
    for x, y in zip((*a.hidden_states, *a.attentions), (*b.hidden_states, *b.attentions), strict=True):
        assert x.shape == y.shape and relative(x, y) <= 1e-5
    loss, logits, *_ = ours(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, a.loss) and torch.equal(logits, a.logits)
    for keep in (1, 5, torch.tensor([0, 7, 3])):
        x, y = ours(ids, logits_to_keep=keep).logits, theirs(ids, logits_to_keep=keep).logits
        assert x.shape == y.shape and relative(x, y) <= 1e-5
    x = ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits
    assert torch.equal(x, a.logits)
    body = ours.transformer(ids, return_dict=False)
    assert len(body) == 1 and torch.equal(body[0], a.hidden_states[-1])


def test_output_record() -> None:
    model = MptForCausalLM(MptConfig(**SHAPE)).eval()
    out = model(torch.randint(0, 97, (1, 5)))
    assert out[0] is out.logits is out["logits"] is out.to_tuple()[0]
    assert list(out) == ["logits"] and "loss" not in out and len(out) == 1 and out[:1] == (out.logits,)
    with pytest.raises(KeyError):
        out["loss"]
    leaves = torch.utils._pytree.tree_leaves(out)
    assert any(leaf is out.logits for leaf in leaves)


def test_logits_come_unless_training_with_labels() -> None:
    model = MptForCausalLM(MptConfig(**SHAPE))
    ids = torch.randint(0, 97, (2, S))
    assert model.train()(ids).logits is not None
    assert model(ids, labels=ids).logits is None
    assert len(model(ids, labels=ids, return_dict=False)) == 1
    assert model(ids, labels=ids, return_logits=True).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None
    assert list(model(ids, labels=ids, return_logits=False)) == ["loss"]


def test_configured_outputs() -> None:
    flags = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    logits, hidden, attentions = MptForCausalLM(MptConfig(**SHAPE, **flags))(torch.randint(0, 97, (1, 5)))
    assert logits.shape == (1, 5, 97) and len(hidden) == 4 and attentions[0].shape == (1, 4, 5, 5)


def test_loss_counts() -> None:
    model = MptForCausalLM(MptConfig(**SHAPE))
    ids = torch.randint(0, 97, (2, S))
    labels = ids.clone()
    labels[0, 3:20] = -100
    counted = int((labels[:, 1:] != -100).sum())
    mean = model(ids, labels=labels).loss
    for items in (10, torch.tensor(10)):
        assert relative(model(ids, labels=labels, num_items_in_batch=items).loss, mean * counted / 10) < 1e-5
    assert model(ids, labels=labels.int()).loss == mean
    for items in (None, 0, torch.tensor(0)):
        model.zero_grad()
        nothing = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
        nothing.backward()
        assert nothing.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("norm_type", ["low_precision_layernorm", "layernorm", "low_precision_rmsnorm", "rmsnorm"])
def test_autocast(norm_type: str) -> None:
    """Outputs near fp32's; the residual stream stays fp32; each norm gives the dtype that it should."""
    config = MptConfig(**SHAPE, norm_type=norm_type, attn_config={"qk_ln": True}, no_bias=False)
    model = MptForCausalLM(config).eval()
    ids, mask = torch.randint(0, 97, (2, S)), torch.ones(2, S)
    mask[0, :3] = 0
    given: list[torch.dtype] = []
    block = model.transformer.blocks[1]
    handles = [
        n.register_forward_hook(lambda m, i, o: given.append((o[0] if type(o) is tuple else o).dtype))
        for n in (block.norm_1, block.norm_2)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
    assert given == [torch.bfloat16 if norm_type == "low_precision_layernorm" else torch.float32] * 2
    assert [h.dtype for h in out.hidden_states[:-1]] == [torch.float32] * 3 and out.loss.dtype == torch.float32
    assert out.logits.dtype == torch.bfloat16
    for handle in handles:
        handle.remove()
    plain = model(ids, attention_mask=mask, labels=ids)
    assert relative(out.logits[mask == 1], plain.logits[mask == 1]) < 0.03
    assert relative(out.loss, plain.loss) < 0.01
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_bf16_parameters() -> None:
    model = MptForCausalLM(MptConfig(**SHAPE)).eval()
    ids = torch.randint(0, 97, (2, S))
    plain = model(ids).logits
    out = model.bfloat16()(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert relative(out.logits.float(), plain) < 0.05
    out.loss.backward()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_gives_the_same_gradients(mode: str) -> None:
    """Dropout included; and it does recompute: every block's norms run twice."""
    model = MptForCausalLM(MptConfig(**SHAPE, resid_pdrop=0.1, attn_config={"attn_pdrop": 0.1}))
    ids, runs = torch.randint(0, 97, (2, S)), []
    for block in model.transformer.blocks:
        block.norm_1.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(5)
    model(ids, labels=ids).loss.backward()
    plain, once = [p.grad.clone() for p in model.parameters()], len(runs)
    model.zero_grad()
    model.transformer.set_activation_checkpointing(mode)
    torch.manual_seed(5)
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
    assert len(runs) == 3 * once


@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_activation_checkpointing_by_its_usual_names(name: str) -> None:
    for model in (MptForCausalLM(MptConfig(**SHAPE)), MptModel(MptConfig(**SHAPE))):
        enable, disable = (getattr(model, f"{name}_checkpointing_{verb}") for verb in ("enable", "disable"))
        for given in ({}, {f"{name}_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": 1}):
            assert not getattr(model, f"is_{name}_checkpointing")
            enable(**given)
            assert getattr(model, f"is_{name}_checkpointing")
            assert {block.activation_checkpointing for block in model.base_model.blocks} == {"full"}
            disable()
        for wrong in (
            ({"use_reentrant": True},),
            ({"debug": True},),
            (None, {"every_n_layers": 2}),
            (None, {"offload": True}),
        ):
            with pytest.raises(ValueError, match=r"is asked for \w+=\w+; supported are use_reentrant=False"):
                enable(wrong[0], **dict(*wrong[1:]))


def test_size_and_place() -> None:
    """num_parameters as transformers counts; device and dtype of the parameters."""
    for extra in ({}, {"tie_word_embeddings": False}):
        ours, theirs = MptForCausalLM(MptConfig(**SHAPE, **extra)), TheirModel(TheirConfig(**SHAPE, **extra))
        for model in (ours, theirs):
            model.transformer.norm_f.weight.requires_grad_(False)
        for flags in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
            assert ours.num_parameters(**flags) == theirs.num_parameters(**flags)
    learned = MptForCausalLM(MptConfig(**SHAPE, attn_config={"alibi": False}))
    assert learned.num_parameters(exclude_embeddings=True) == ours.num_parameters(exclude_embeddings=True) - 97 * 64
    assert (ours.device, ours.dtype) == (torch.device("cpu"), torch.float32)
    assert MptModel(MptConfig(**SHAPE, init_device="meta")).bfloat16().device.type == "meta"
    assert ours.half().dtype == torch.float16
    assert ours.base_model is ours.transformer and ours.base_model.base_model is ours.base_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_without_memory_gives_shapes(dtype: torch.dtype) -> None:
    model = MptForCausalLM(MptConfig(**SHAPE, init_device="meta")).to(dtype)
    ids = torch.zeros(2, S, dtype=torch.long, device="meta")
    out = model.eval()(ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert (out.logits.shape, out.logits.dtype, out.loss.shape) == ((2, S, 97), dtype, ())
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("mean", [True, False])
def test_resize_token_embeddings(tie: bool, mean: bool) -> None:
    model = MptForCausalLM(MptConfig(**SHAPE, tie_word_embeddings=tie, initializer_range=0.5)).bfloat16().eval()
    ids = torch.randint(0, 97, (2, S))
    before, wte = model(ids).logits, model.get_input_embeddings()
    weights = [m.weight.clone() for m in dict.fromkeys((wte, model.get_output_embeddings()))]
    assert model.resize_token_embeddings(mean_resizing=mean) is wte and wte.weight.shape == (97, 64)
    wte.weight.requires_grad_(False)
    assert model.resize_token_embeddings(101, pad_to_multiple_of=32, mean_resizing=mean) is wte
    assert model.config.vocab_size == wte.num_embeddings == 128
    after = model(torch.cat((ids, torch.full((2, 1), 127)), 1)).logits
    assert after.shape == (2, S + 1, 128) and torch.equal(after[:, :-1, :97], before)
    for layer, weight in zip(dict.fromkeys((wte, model.get_output_embeddings())), weights, strict=True):
        assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight[:97], weight)
        if mean:
            assert relative(layer.weight[97:].float(), weight.float().mean(0, keepdim=True)) < 0.01
        else:
            assert 0.4 < layer.weight[97:].float().std() < 0.6
    assert not wte.weight.requires_grad and (tie or model.lm_head.weight.requires_grad)
    assert tie or model.lm_head.out_features == 128
    model.resize_token_embeddings(50)
    assert model(ids % 50).logits.shape == (2, S, 50) and torch.equal(wte.weight, weights[0][:50])
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(model.config)


def test_resize_refuses() -> None:
    model = MptForCausalLM(MptConfig(**SHAPE, eos_token_id=90))
    for given, message in (
        ({"new_num_tokens": 80}, "eos_token_id is 90; ids must be in 0..79"),
        ({"new_num_tokens": 0}, "new_num_tokens is 0; it must be a positive"),
        ({"new_num_tokens": 100.0}, "new_num_tokens is 100.0"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of is -8"),
    ):
        with pytest.raises(ValueError, match=message):
            model.resize_token_embeddings(**given)
        assert model.config.vocab_size == 97 and model.get_input_embeddings().weight.shape == (97, 64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
        with pytest.raises(ValueError, match="cannot resize sharded weights; call it before fully_shard"):
            model.resize_token_embeddings(128)
    finally:
        dist.destroy_process_group()


def test_other_input_embeddings() -> None:
    model = MptForCausalLM(MptConfig(**SHAPE)).eval()
    ids, other = torch.randint(0, 97, (2, S)), torch.nn.Embedding(97, 64)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other is model.get_output_embeddings()
    out = model(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[0], other.weight[ids])
    assert relative(out.logits, out.hidden_states[-1] @ other.weight.T) < 1e-5
    for wrong, message in (
        (torch.nn.Embedding(98, 64), r"weight \(98, 64\); it must be \(vocab_size, d_model\) = \(97, 64\); resize"),
        (torch.zeros(97, 64), r"embeddings are a Tensor; pass an nn\.Embedding with weight \(97, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_input_embeddings(wrong)
    assert MptModel(MptConfig(**SHAPE)).get_output_embeddings() is None


def test_another_head() -> None:
    ids, other = torch.randint(0, 97, (2, S)), torch.nn.Linear(64, 97, bias=False)
    model = MptForCausalLM(MptConfig(**SHAPE, tie_word_embeddings=False)).eval()
    model.set_output_embeddings(other)
    assert model.get_output_embeddings() is other is model.lm_head
    out = model(ids, output_hidden_states=True)
    assert relative(out.logits, out.hidden_states[-1] @ other.weight.T) < 1e-5
    for wrong, message in (
        (torch.nn.Linear(64, 98, bias=False), r"are a Linear \(98, 64\); pass an nn\.Linear with .* = \(97, 64\)"),
        (torch.zeros(97, 64), r"are a Tensor \(97, 64\); pass an nn\.Linear"),
        (torch.nn.Linear(64, 97), "have a bias"),
    ):
        with pytest.raises(ValueError, match=f"new_embeddings {message}"):
            model.set_output_embeddings(wrong)
    tied, embedding = MptForCausalLM(MptConfig(**SHAPE)), torch.nn.Embedding(97, 64)
    tied.set_output_embeddings(embedding)
    assert tied.get_input_embeddings() is embedding is tied.get_output_embeddings()


@pytest.mark.parametrize("config", [{"d_model": 64}, "path", TheirConfig(d_model=64, n_heads=4, n_layers=1)])
def test_a_configuration_of_another_kind(config: object) -> None:
    with pytest.raises(TypeError, match=r"config is a \w+\..*pass an mpt\.MptConfig"):
        MptModel(config)


def test_blocks_compile_whole() -> None:
    """Each block traces without a graph break, under autocast too."""
    model = MptForCausalLM(MptConfig(**SHAPE, no_bias=False, attn_config={"qk_ln": True, "clip_qkv": 3}))
    ids = torch.randint(0, 97, (2, S))
    plain = model(ids, labels=ids).loss
    for block in model.transformer.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert relative(model(ids, labels=ids).loss, plain) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()


def test_fsdp_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fully_shard casts a module's floating arguments; ALiBi's slopes must stay fp32. Gradients come back in fp32."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    attention = kernels.flash_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **rest):
        seen.append((q.dtype, rest["alibi_slopes"].dtype))
        return attention(q, k, v, **rest)

    monkeypatch.setattr(kernels, "flash_attention", record)
    model = MptForCausalLM(MptConfig(**SHAPE))
    ids = torch.randint(0, 97, (2, S))
    plain = model(ids, labels=ids).loss
    seen.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.transformer.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        model.transformer.set_activation_checkpointing("selective")
        loss = model(ids, labels=ids).loss
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert seen and set(seen) == {(torch.bfloat16, torch.float32)}
    assert relative(loss, plain) < 0.01
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_linear_without_gradients(bias: bool) -> None:
    """Another product than torch's serves there, for few rows and many; the numbers are the same."""
    layer = MptLinear(768, 640, bias=bias)
    for shape in ((1, 1, 768), (4, 1, 768), (2, 3, 768), (2, 20, 768), (5, 768), (0, 768)):
        x = torch.randn(shape)
        with torch.no_grad():
            out = layer(x)
        plain = layer(x)
        assert out.shape == plain.shape and out.is_contiguous() and plain.requires_grad and not out.requires_grad
        assert out.numel() == 0 or relative(out, plain) < 1e-5


def test_a_compiled_layer_leaves_its_product_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = MptLinear(64, 64, bias=False), torch.randn(512, 64)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr("mpt.model.product", None)
        assert torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(x), expected, atol=1e-6)


def test_tied_head() -> None:
    model = MptForCausalLM(MptConfig(**SHAPE))
    assert model.get_output_embeddings() is model.get_input_embeddings() and "lm_head.weight" not in model.state_dict()
    state = model.state_dict()
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    model.load_state_dict(state)
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight"):
        model.load_state_dict(state)


IDS = torch.arange(10).view(2, 5)
REFUSED = [
    ({}, {"past_key_values": ()}, "past_key_values is tuple; pass an MptCache"),
    ({}, {"past_key_values": MptCache(), "use_cache": False}, "use_cache is False and past_key_values is given"),
    ({}, {"cache_position": IDS[1]}, r"cache_position is 5\.\.9; past_key_values holds 0 columns"),
    ({}, {"input_ids": None}, "either input_ids or inputs_embeds"),
    ({}, {"inputs_embeds": torch.zeros(2, 5, 64)}, "either input_ids or inputs_embeds"),
    ({}, {"input_ids": IDS[0]}, r"input_ids must be \(B, S\)"),
    ({}, {"input_ids": IDS[:, :0]}, r"none of them 0, not \(2, 0\)"),
    ({}, {"input_ids": IDS.float()}, "input_ids are torch.float32; they must be int64 or int32"),
    ({}, {"input_ids": [[1, 2]]}, "are tensors, not list; call torch.tensor"),
    ({}, {"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 60)}, r"inputs_embeds are \(2, 5, 60\); d_model is 64"),
    ({}, {"input_ids": None, "inputs_embeds": IDS[..., None]}, "inputs_embeds are torch.int64; they must be floating"),
    ({}, {"input_ids": IDS + 90}, r"input_ids hold 99; ids must be in 0\.\.96"),
    ({}, {"input_ids": IDS - 1}, r"input_ids hold -1; ids must be in 0\.\.96"),
    ({}, {"attention_mask": torch.ones(2, 4)}, r"attention_mask is \(2, 4\)"),
    ({}, {"attention_mask": torch.ones(2, 1, 5, 5)}, "attention_mask is"),
    ({}, {"attention_mask": torch.full((2, 5), -1e9)}, r"attention_mask holds -1000000000\.0; it is 1 where"),
    ({}, {"attention_mask": [[1] * 5] * 2}, "attention_mask is a list; it must be a tensor"),
    ({}, {"attention_mask": torch.ones(2, 5, dtype=torch.long) - 2}, r"attention_mask holds -1\.0; it is 1 where"),
    ({}, {"labels": IDS[:, 1:]}, r"labels are \(2, 4\)"),
    ({}, {"labels": IDS.float()}, "labels are torch.float32; they must be a tensor of integers"),
    ({}, {"labels": [[1] * 5] * 2}, "labels are list; they must be a tensor of integers"),
    ({}, {"prefix_mask": torch.ones(2, 5)}, "takes no prefix_mask"),
    ({"prefix_lm": True}, {}, "needs prefix_mask"),
    ({"attn_uses_sequence_id": True}, {}, "training needs sequence_id"),
    ({"attn_uses_sequence_id": True}, {"sequence_id": IDS, "token_type_ids": IDS}, "two names of one argument"),
    ({"alibi": False}, {"input_ids": torch.zeros(1, 41, dtype=torch.long)}, "41 positions and max_seq_len is 40"),
]


@pytest.mark.parametrize(("attn", "kwargs", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_refuses(attn: dict, kwargs: dict, message: str) -> None:
    model = MptForCausalLM(MptConfig(**SHAPE, attn_config=attn))
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS} | kwargs))


def test_warnings() -> None:
    with pytest.warns(UserWarning, match="no notion of positions"):
        MptModel(MptConfig(**SHAPE, learned_pos_emb=False, attn_config={"alibi": False}))
    with pytest.warns(UserWarning, match="attn_uses_sequence_id is False: it has no effect"):
        MptModel(MptConfig(**SHAPE))(IDS, sequence_id=IDS)
    model = MptForCausalLM(MptConfig(**SHAPE, attn_config={"attn_uses_sequence_id": True})).eval()
    model(IDS)  # plain causal in eval mode


def test_learned_positions_count_real_tokens() -> None:
    """Left padding may take a row past max_seq_len, real tokens may not."""
    model = MptForCausalLM(MptConfig(**SHAPE, attn_config={"alibi": False})).eval()
    ids, mask = torch.randint(0, 97, (1, 44)), torch.ones(1, 44, dtype=torch.bool)
    mask[0, :6] = False
    assert relative(model(ids, attention_mask=mask).logits[:, 6:], model(ids[:, 6:]).logits) < 1e-5
    mask[0, 2:] = True
    with pytest.raises(ValueError, match="42 positions and max_seq_len is 40"):
        model(ids, attention_mask=mask)


# ---- on a GPU (MPT_TEST_DEVICE=cuda), else small in Triton's interpreter ---------------------------------------------


def lively(**shape) -> MptForCausalLM:
    model = MptForCausalLM(MptConfig(**shape, n_layers=2, no_bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3) + (p.dim() == 1))
    return model


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_triton_against_float64_on_a_cpu(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers with packed documents and padding: loss, logits and every gradient by the kernels' error rule."""
    d, heads, s, vocab = size((512, 8, 700, 5003), (32, 2, 40, 97))
    shape = {"d_model": d, "n_heads": heads, "vocab_size": vocab, "max_seq_len": s}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def run(model: MptForCausalLM, implementation: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        monkeypatch.setenv("MPT_KERNELS", implementation)
        place = next(model.parameters())
        low = precision == "autocast" and place.dtype == torch.float32
        with torch.autocast(place.device.type, torch.bfloat16, enabled=low):
            out = model(**{name: x.to(place.device) for name, x in batch.items()}, return_logits=True)
        out.loss.backward()
        found = {"loss": out.loss, "logits": out.logits} | {name: p.grad for name, p in model.named_parameters()}
        return {name: x.detach().cpu() for name, x in found.items()}

    def draw() -> list[Row]:
        model = lively(**shape, attn_config={"attn_uses_sequence_id": True}).train().to(dtype)
        ids, documents = torch.randint(vocab, (2, s)), (torch.rand(2, s) < 4 / s).cumsum(1)
        documents[1, -s // 5 :] = -1
        batch = {"input_ids": ids, "labels": ids.masked_fill(documents < 0, -100), "sequence_id": documents}
        ours, plain = (copy.deepcopy(model).to(DEVICE) for _ in range(2))
        got, usual = run(ours, "triton", batch), run(plain, "reference", batch)
        exact = run(model.double(), "torch", batch)
        seen = documents >= 0
        for found in (got, usual, exact):
            found["logits"] = found["logits"][seen]
        return [(name, got[name], usual[name], exact[name]) for name in exact]

    hold(draw, torch.float32 if precision == "fp32" else torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
def test_triton_generates_what_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    d, heads, s, vocab, new = size((512, 8, 700, 5003, 40), (32, 2, 40, 97, 3))
    model = lively(d_model=d, n_heads=heads, vocab_size=vocab, max_seq_len=s + new).eval()
    ids, mask = torch.randint(vocab, (2, s)), torch.ones(2, s, dtype=torch.long)
    mask[0, : s // 3] = 0
    expected = model.generate(ids, mask, max_new_tokens=new)
    monkeypatch.setenv("MPT_KERNELS", "triton")
    model = model.to(DEVICE)
    assert torch.equal(model.generate(ids.to(DEVICE), mask.to(DEVICE), max_new_tokens=new).cpu(), expected)
