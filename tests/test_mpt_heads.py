"""Every class against transformers'; the classifiers' losses, outputs, checkpoints across classes, and refusals."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import mpt
from mpt import (
    MptCache,
    MptConfig,
    MptForCausalLM,
    MptForQuestionAnswering,
    MptForSequenceClassification,
    MptForTokenClassification,
    MptModel,
)
from mpt.checkpoint import load_weights

CLASSIFIERS = [MptForSequenceClassification, MptForTokenClassification, MptForQuestionAnswering]
CLASSES = [MptModel, MptForCausalLM, *CLASSIFIERS]
SHAPE = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 40, "pad_token_id": 0}
B, S = 3, 19


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def theirs_of(cls: type) -> type:
    return getattr(transformers, cls.__name__)


def pair(cls: type, **extra) -> tuple[mpt.MptPreTrainedModel, transformers.PreTrainedModel]:
    """Ours and transformers', in eval mode, with the same lively weights."""
    theirs = theirs_of(cls)(transformers.MptConfig(**(SHAPE | extra))).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.3) + (p.dim() == 1))
    ours = cls(MptConfig(**(SHAPE | extra))).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(padding: str = "none") -> tuple[Tensor, Tensor]:
    """ids without the padding token, but for the padding; their mask."""
    ids, mask = torch.randint(1, 97, (B, S)), torch.ones(B, S, dtype=torch.long)
    if padding == "left":
        mask[0, :5], mask[1, :12] = 0, 0
    elif padding == "right":
        mask[0, -5:], mask[1, -12:] = 0, 0
    return ids * mask, mask


def close_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Relative to a parameter's largest, or its layer's: that of qa_outputs.bias is rounding, since a shift of all
    scores changes no softmax.
    """
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        layer = expected[name.replace(".bias", ".weight")]
        assert (p.grad - expected[name]).abs().max() <= 1e-5 * max(expected[name].abs().max(), layer.abs().max()), name


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return [n for n, _ in a.named_parameters()] == [*theirs] and all(
        torch.equal(p, theirs[n]) for n, p in a.named_parameters()
    )


def scores(out, mask: Tensor) -> Tensor:
    """What an output says at real positions, in one vector."""
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits))[:, mask == 1].flatten()
    if "last_hidden_state" in out:
        return out.last_hidden_state[mask == 1].flatten()
    return (out.logits if out.logits.dim() == 2 else out.logits[mask == 1]).flatten()


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("cls", CLASSES)
def test_equals_transformers(cls: type, padding: str, given: str) -> None:
    """What is said at real positions, hidden states, attentions, and the gradients of a mixture of what is said."""
    ours, theirs = pair(cls)
    ids, mask = inputs(padding)
    mixture, outs = None, []
    for model in (ours, theirs):
        x = ids if given == "input_ids" else model.get_input_embeddings()(ids)
        flags = {"output_hidden_states": True, "output_attentions": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of padding in inputs_embeds, where it is at the end
            out = model(**{given: x}, attention_mask=mask, **flags)
        said = scores(out, mask)
        mixture = torch.randn_like(said) if mixture is None else mixture
        (said * mixture).sum().backward()
        outs.append(out)
    a, b = outs
    if not (given == "inputs_embeds" and padding == "right" and "score.weight" in ours.state_dict()):
        assert relative(scores(a, mask), scores(b, mask)) <= 1e-5
        close_gradients(ours, theirs)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert relative(x[mask == 1], y[mask == 1]) <= 1e-5
    for x, y in zip(a.attentions, b.attentions, strict=True):
        assert relative(x.transpose(1, 2)[mask == 1], y.transpose(1, 2)[mask == 1]) <= 1e-5


LOSSES = {  # class, configuration, labels
    "regression": (MptForSequenceClassification, {"num_labels": 1}, lambda: {"labels": torch.randn(B)}),
    "regression, a column": (MptForSequenceClassification, {"num_labels": 1}, lambda: {"labels": torch.randn(B, 1)}),
    "regression of 3": (
        MptForSequenceClassification,
        {"num_labels": 3, "problem_type": "regression"},
        lambda: {"labels": torch.randn(B, 3)},
    ),
    "single label": (MptForSequenceClassification, {"num_labels": 5}, lambda: {"labels": torch.tensor([4, 0, 2])}),
    "single label, two classes": (MptForSequenceClassification, {}, lambda: {"labels": torch.tensor([1, 0, 1])}),
    "single label, one ignored": (MptForSequenceClassification, {}, lambda: {"labels": torch.tensor([1, -100, 0])}),
    "multi label": (MptForSequenceClassification, {"num_labels": 5}, lambda: {"labels": torch.rand(B, 5).round()}),
    "multi label by name": (
        MptForSequenceClassification,
        {"num_labels": 2, "problem_type": "multi_label_classification"},
        lambda: {"labels": torch.rand(B, 2)},
    ),
    "tokens": (
        MptForTokenClassification,
        {"num_labels": 5},
        lambda: {"labels": torch.randint(0, 5, (B, S)).masked_fill(torch.rand(B, S) < 0.3, -100)},
    ),
    "spans": (
        MptForQuestionAnswering,
        {},
        lambda: {"start_positions": torch.tensor([0, 5, S]), "end_positions": torch.tensor([S - 1, 7, 90])},
    ),
    "spans, columns": (
        MptForQuestionAnswering,
        {},
        lambda: {"start_positions": torch.tensor([[1], [-3], [2]]), "end_positions": torch.tensor([[4], [3], [2]])},
    ),
}


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("case", LOSSES)
def test_losses_equal_transformers(case: str, padding: str) -> None:
    cls, extra, draw = LOSSES[case]
    labels = draw()
    ours, theirs = pair(cls, **extra)
    ids, mask = inputs(padding)
    a = ours(ids, attention_mask=mask, **labels)
    b = theirs(ids, attention_mask=mask, **copy.deepcopy(labels))
    assert a.loss.dtype == torch.float32 and relative(a.loss, b.loss) <= 1e-5
    a.loss.backward()
    b.loss.backward()
    close_gradients(ours, theirs)
    assert ours.config.problem_type == extra.get("problem_type")  # not decided for the next call


def test_token_regression() -> None:
    """transformers takes a cross-entropy of one class, which is 0."""
    model = MptForTokenClassification(MptConfig(**SHAPE, num_labels=1)).eval()
    ids, mask = inputs("left")
    labels = torch.randn(B, S).masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    errors = (out.logits[..., 0] - labels)[mask == 1].double()
    assert abs(out.loss.item() - errors.square().mean().item()) < 1e-6
    whole = model(ids, attention_mask=mask, labels=labels.long()).loss
    assert whole.isfinite() and whole != out.loss


@pytest.mark.parametrize(
    ("cls", "extra", "labels"),
    [
        (MptForSequenceClassification, {}, {"labels": torch.full((B,), -100)}),
        (MptForTokenClassification, {}, {"labels": torch.full((B, S), -100)}),
        (MptForTokenClassification, {"num_labels": 1}, {"labels": torch.full((B, S), -100.0)}),
        (MptForQuestionAnswering, {}, {name: torch.full((B,), S) for name in ("start_positions", "end_positions")}),
    ],
)
def test_nothing_counts(cls: type, extra: dict, labels: dict) -> None:
    model = cls(MptConfig(**SHAPE, **extra))
    loss = model(inputs()[0], **labels).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_bf16_losses_are_fp32() -> None:
    for cls, extra, draw in LOSSES.values():
        loss = cls(MptConfig(**SHAPE, **extra)).bfloat16()(inputs()[0], **draw()).loss
        loss.backward()
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_tuples_and_configured_outputs(cls: type) -> None:
    """In order what the record holds, hidden states too, which transformers' lose in two of three classes."""
    flags = {"output_hidden_states": True, "output_attentions": True}
    model = cls(MptConfig(**SHAPE, **flags)).eval()
    ids = inputs()[0]
    out = model(ids)
    names = ["start_logits", "end_logits"] if cls is MptForQuestionAnswering else ["logits"]
    assert list(out) == [*names, "hidden_states", "attentions"] and type(out).__name__ in dir(
        transformers.modeling_outputs
    )
    record = getattr(transformers.modeling_outputs, type(out).__name__)
    assert list(record.__dataclass_fields__) == list(out.__dataclass_fields__)
    *said, hidden, attentions = model(ids, return_dict=False)
    assert all(torch.equal(a, out[name]) for a, name in zip(said, names, strict=True))
    assert len(hidden) == 3 and hidden[0].shape == (B, S, 64) and attentions[1].shape == (B, 4, S, S)
    model.config.return_dict = False
    assert len(model(ids, output_attentions=False, output_hidden_states=False)) == len(names)
    leaves = torch.utils._pytree.tree_leaves(out)
    assert any(leaf is out[names[0]] for leaf in leaves)


def test_the_last_token() -> None:
    """By pad_token_id, wherever it stands; a row of padding only takes its first position; without it, the last."""
    model = MptForSequenceClassification(MptConfig(**SHAPE)).eval()
    hidden = {}
    model.score.register_forward_hook(lambda m, given, _: hidden.update(given=given[0]))
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 0, 0], [0, 0, 3, 4], [3, 0, 4, 0], [0, 0, 0, 0]])
    body = model.transformer(ids).last_hidden_state
    for pad, expected in ((0, [3, 1, 3, 2, 0]), (None, [3] * 5), (4, [3, 3, 2, 3, 3])):
        model.config.pad_token_id = pad
        model(ids)
        assert torch.equal(hidden["given"], body[range(5), expected])
    model.config.pad_token_id = None
    with pytest.warns(UserWarning, match=r"config\.pad_token_id is None: the last position is classified"):
        model(ids, attention_mask=ids != 0)
    model.config.pad_token_id = 0
    with pytest.warns(UserWarning, match="inputs_embeds do not show where padding is"):
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=ids != 0)


@pytest.mark.parametrize("cls", CLASSIFIERS)
@pytest.mark.parametrize("attn", [{"attn_uses_sequence_id": True}, {"prefix_lm": True}], ids=["sequences", "prefix"])
def test_sequences_and_prefixes_reach_the_attention(cls: type, attn: dict) -> None:
    model = cls(MptConfig(**SHAPE, attn_config=attn)).eval()
    ids = inputs()[0]
    first = {"token_type_ids": (torch.arange(S) > 7).long().expand(B, S)}
    if "prefix_lm" in attn:
        first = {"prefix_mask": (torch.arange(S) < 7).expand(B, S)}
    hidden = model.transformer(ids, **first).last_hidden_state
    out = model(ids, **first, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], hidden)
    other = {name: torch.zeros_like(value) for name, value in first.items()}
    assert not torch.equal(model(ids, **other)[0], out[0])


def test_caches() -> None:
    """A sequence in two calls gives what one gives; only sequence classification's output has a place for the cache."""
    ids = inputs()[0]
    model = MptForSequenceClassification(MptConfig(**SHAPE)).eval()
    first = model(ids[:, :8], use_cache=True)
    assert list(first) == ["logits", "past_key_values"]
    logits, cache = model(ids[:, 8:], past_key_values=first.past_key_values, return_dict=False)
    assert cache is first.past_key_values and relative(logits, model(ids).logits) <= 1e-5
    tokens, cache = MptForTokenClassification(MptConfig(**SHAPE)).eval(), MptCache()
    said = [tokens(part, past_key_values=cache, return_dict=False) for part in (ids[:, :8], ids[:, 8:])]
    assert [len(out) for out in said] == [1, 1] and cache.columns == S
    assert relative(torch.cat([out[0] for out in said], 1), tokens(ids).logits) <= 1e-5
    spans = MptForQuestionAnswering(MptConfig(**SHAPE, use_cache=True)).eval()
    assert list(spans(ids)) == ["start_logits", "end_logits"]


def test_classifier_dropout() -> None:
    """classifier_dropout, else hidden_dropout, else 0.1; on the hidden states, in train mode only."""
    for extra, p in (
        ({}, 0.1),
        ({"hidden_dropout": 0.3}, 0.3),
        ({"hidden_dropout": 0.3, "classifier_dropout": 0.0}, 0.0),
        ({"classifier_dropout": 0.5}, 0.5),
    ):
        config = MptConfig(**SHAPE, **extra)
        theirs = transformers.MptForTokenClassification(transformers.MptConfig(**config.to_dict()))
        model = MptForTokenClassification(MptConfig.from_dict(config.to_dict()))
        assert model.dropout.p == theirs.dropout.p == p
    seen = []
    model.classifier.register_forward_hook(lambda m, given, _: seen.append(given[0]))
    ids = torch.randint(1, 97, (8, 40))
    model.train()(ids)
    model.eval()(ids)
    dropped = seen[0] == 0
    assert 0.45 < dropped.double().mean() < 0.55
    assert relative(seen[0][~dropped], seen[1][~dropped] * 2) < 1e-5


@pytest.mark.parametrize("cls", CLASSES)
def test_checkpoints_of_each_class(tmp_path: Path, cls: type) -> None:
    """Ours loads in transformers' class of the same name, and theirs in ours, head and labels included; no warning."""
    extra = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}}
    ours, theirs = pair(cls, **extra)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
        theirs.save_pretrained(tmp_path / "theirs")
        back, again = (cls.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert same(back, ours) and same(again, ours) and not back.training
    assert back.config.id2label == again.config.id2label == extra["id2label"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [cls.__name__]
    loaded, info = theirs_of(cls).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same(loaded, theirs) and loaded.config.id2label == extra["id2label"]


@pytest.mark.parametrize("cls", CLASSIFIERS)
@pytest.mark.parametrize("tie", [True, False])
def test_a_base_checkpoint_gets_a_fresh_head(tmp_path: Path, cls: type, tie: bool) -> None:
    base = MptForCausalLM(MptConfig(**SHAPE, tie_word_embeddings=tie, initializer_range=0.5))
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning) as said:
        model = cls.from_pretrained(tmp_path, num_labels=40, dtype=torch.bfloat16)
    message = str(said[0].message)
    heads = {name: p for name, p in model.named_parameters() if not name.startswith("transformer.")}
    assert len(said) == 1 and said[0].filename == __file__
    assert f"has no {' and '.join(sorted(heads))}: initialised at random, train before use" in message
    assert ("lm_head.weight, which" in message) is not tie
    assert same(model.transformer, base.transformer.bfloat16())
    for name, p in heads.items():
        assert p.dtype == torch.bfloat16 and (name.endswith("bias") or 0.3 < p.float().std() < 0.7)
        assert not (name.endswith("bias") and p.any())
    if cls is not MptForQuestionAnswering:
        assert model.config.num_labels == 40 and len(next(iter(heads.values()))) == 40


def test_heads_of_other_classes(tmp_path: Path) -> None:
    model = MptForTokenClassification(MptConfig(**SHAPE))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has classifier\.bias and classifier\.weight, which MptForCausalLM does not"):
        assert same(MptForCausalLM.from_pretrained(tmp_path).transformer, model.transformer)
    with pytest.warns(UserWarning, match=r"no score\.weight.*; it has classifier\.bias and classifier\.weight, which"):
        MptForSequenceClassification.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(MptModel.from_pretrained(tmp_path), model.transformer)
    with pytest.raises(
        ValueError, match=r"is a classifier's: it has classifier\.bias and .* set that to True, or load"
    ):
        MptForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"classifier\.weight expected \(3, 64\), found \(2, 64\)"):
        MptForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing     classifier\.bias"):
        MptForTokenClassification.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_sharded_classifiers(tmp_path: Path, cls: type) -> None:
    """A base checkpoint onto a sharded classifier, a step's gradients, and back to a folder of its class."""
    MptForCausalLM(MptConfig(**SHAPE)).save_pretrained(tmp_path / "base")
    ids = inputs()[0]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = cls(MptConfig(**SHAPE, num_labels=3))
        for block in model.transformer.blocks:
            fully_shard(block)
        fully_shard(model)
        with pytest.warns(UserWarning, match="initialised at random"):
            load_weights(model, tmp_path / "base")
        out = model.eval()(ids)
        sum(value.square().mean() for value in out.values()).backward()
        assert all(p.grad is not None and p.grad.full_tensor().any() for p in model.parameters())
        model.save_pretrained(tmp_path / "again")
    finally:
        dist.destroy_process_group()
    back = cls.from_pretrained(tmp_path / "again")
    assert relative(back(ids)[0], out[0]) <= 1e-5
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [cls.__name__]


def test_from_pretrained_takes_fields_and_configurations(tmp_path: Path) -> None:
    config = MptConfig(**SHAPE, attn_config={"clip_qkv": 6, "softmax_scale": 0.3}, id2label={0: "a", 1: "b", 2: "c"})
    MptForSequenceClassification(config).save_pretrained(tmp_path)
    take = MptForSequenceClassification.from_pretrained
    problem = {"problem_type": "multi_label_classification", "attn_config": {"clip_qkv": 6}}
    model = take(tmp_path, **problem, hidden_size=64)
    assert model.config.problem_type == "multi_label_classification" and model.config.num_labels == 3
    assert (model.config.attn_config.clip_qkv, model.config.attn_config.softmax_scale) == (6, 0.3)
    assert take(tmp_path, num_labels=3).config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert take(tmp_path, config=config).config is config
    assert (
        take(tmp_path, dtype="bfloat16").dtype == torch.bfloat16 and take(tmp_path, dtype="auto").dtype == torch.float32
    )
    for wrong, error, message in (
        ({"num_label": 3}, ValueError, "unknown key num_label .*did you mean 'num_labels'"),
        ({"config": config, "num_labels": 3}, ValueError, "config and num_labels are given"),
        ({"torch_dtype": torch.float16}, TypeError, "no 'torch_dtype'; its name is dtype"),
        ({"device_map": "auto"}, TypeError, "no 'device_map'; pass device"),
        ({"trust_remote_code": True}, TypeError, "code from a checkpoint is never run"),
        ({"local_files_only": True}, TypeError, "no 'local_files_only'; set HF_HUB_OFFLINE=1"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'; give float32, bfloat16 or float16"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, ValueError, "num_labels is 3 and id2label names 2"),
    ):
        with pytest.raises(error, match=message):
            take(tmp_path, **wrong)


IDS = torch.arange(10).view(2, 5)
SEQUENCE, TOKEN, QA = CLASSIFIERS
MULTI = {"problem_type": "multi_label_classification"}
REFUSED = [
    (SEQUENCE, {}, {"labels": torch.tensor([0, 2])}, r"labels hold 2; .*num_labels 2 takes 0\.\.1, or -100 to ignore"),
    (SEQUENCE, {}, {"labels": torch.tensor([0, -1])}, "labels hold -1"),
    (SEQUENCE, {}, {"labels": torch.tensor([[0], [1]])}, r"labels are \(2, 1\); for problem_type single.* be \(2,\)"),
    (SEQUENCE, {}, {"labels": torch.tensor([0.0, 1.0])}, r"labels are \(2,\); for problem_type multi.* be \(2, 2\)"),
    (SEQUENCE, {"problem_type": "single_label_classification"}, {"labels": torch.zeros(2)}, "float32; each is a class"),
    (SEQUENCE, {"num_labels": 1}, {"labels": torch.zeros(2, 2)}, r"must be \(2, 1\) or \(2,\)"),
    (SEQUENCE, MULTI, {"labels": torch.tensor([[0.0, 1.5]] * 2)}, r"labels hold 0\.0 to 1\.5; .* takes 0 to 1"),
    (SEQUENCE, {}, {"labels": [0, 1]}, "labels are a list; they must be a tensor"),
    (TOKEN, {}, {"labels": torch.tensor([0, 1])}, r"labels are \(2,\); for token classification.* be \(2, 5\)"),
    (TOKEN, {}, {"labels": torch.full((2, 5), 3)}, r"labels hold 3; token classification .* takes 0\.\.1"),
    (TOKEN, {}, {"labels": torch.zeros(2, 5)}, "float32; each is a class in 0..1"),
    (TOKEN, MULTI, {"labels": torch.zeros(2, 5)}, "problem_type is 'multi_label_classification', which token"),
    (QA, {}, {"start_positions": torch.tensor([0, 1])}, "start_positions are given without end_positions"),
    (QA, {}, {"start_positions": IDS, "end_positions": IDS}, r"start_positions are \(2, 5\); for question answering"),
    (
        QA,
        {},
        {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([0.0, 1.0])},
        "end_positions are torch.float32; each is a position",
    ),
    (SEQUENCE, {}, {"input_ids": None}, "either input_ids or inputs_embeds"),
    (TOKEN, {}, {"inputs_embeds": torch.zeros(2, 5, 64)}, "either input_ids or inputs_embeds"),
    (QA, {}, {"attention_mask": torch.ones(2, 4)}, r"attention_mask is \(2, 4\)"),
    (SEQUENCE, {}, {"input_ids": IDS + 90}, r"input_ids hold 99; ids must be in 0\.\.96"),
]


@pytest.mark.parametrize(("cls", "extra", "kwargs", "message"), REFUSED, ids=[r[-1][:50] for r in REFUSED])
def test_refuses(cls: type, extra: dict, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(MptConfig(**SHAPE, **extra))(**({"input_ids": IDS} | kwargs))


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_arguments(cls: type) -> None:
    with pytest.raises(
        TypeError, match=rf"{cls.__name__}\.forward\(\) has no argument 'attention_masks'; did you mean"
    ):
        cls(MptConfig(**SHAPE))(IDS, attention_masks=IDS)
    with pytest.raises(TypeError, match=r"no argument 'position_ids'; positions follow from attention_mask"):
        cls(MptConfig(**SHAPE))(IDS, position_ids=IDS)
