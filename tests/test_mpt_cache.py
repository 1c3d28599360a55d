"""The cache: any way of reading a text in pieces gives what reading it at once gives, for every field and padding."""

import copy

import pytest
import torch
from test_mpt_fields import FIELDS, GQA, PADDING, B, S, close, inputs, model_and_weights
from torch import Tensor
from transformers import MptConfig as TheirConfig
from transformers import MptForCausalLM as TheirModel

import kernels
from mpt import MptCache, MptConfig, MptForCausalLM

PIECES = {"steps": [6, 1, 1, 1, 1, 1, 1, 1], "from one": [1, 1, 11], "odd pieces": [6, 2, 5]}


def read(model: MptForCausalLM, ids: Tensor, pieces: list[int], masks: dict[str, Tensor], **extra) -> tuple:
    """Logits, attentions by piece, and the cache, of reading ids (B, S) in pieces; masks cut to the columns read."""
    cache, end, logits, attentions = MptCache(), 0, [], []
    for size in pieces:
        end += size
        cut = {name: mask[:, :end] for name, mask in masks.items()}
        out = model(ids[:, end - size : end], past_key_values=cache, **cut, **extra)
        assert out.past_key_values is cache and len(cache) == cache.get_seq_length() == end
        logits.append(out.logits)
        attentions.append(out.attentions)
    assert end == ids.shape[1]
    return torch.cat(logits, 1), attentions, cache


@pytest.mark.filterwarnings("ignore:attn_config.alibi and learned_pos_emb")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("field", FIELDS)
@torch.no_grad()
def test_field(field: str, padding: str) -> None:
    model, _, c = model_and_weights(*FIELDS[field])
    model.eval()
    ids, masks, _ = inputs(c, padding)
    if "prefix_mask" in masks:  # a prefix sees itself whole in one piece only
        masks["prefix_mask"] = torch.arange(S).expand(B, S) < torch.tensor([[0], [5], [6]])
    real = masks.get("attention_mask", torch.ones(B, S)).bool()
    expected = model(ids, output_attentions=True, **masks)
    for name, pieces in PIECES.items():
        if "prefix_mask" in masks and name == "from one":
            continue
        logits, attentions, _ = read(model, ids, pieces, masks, output_attentions=name == "odd pieces")
        close(logits[real], expected.logits[real], name)
        assert logits.isfinite().all()
    first = 0
    for size, blocks in zip(PIECES["odd pieces"], attentions, strict=True):
        rows = slice(first, first + size)
        for ours, whole in zip(blocks, expected.attentions, strict=True):
            assert ours.shape == (B, c["n_heads"], size, first + size)
            seen = whole[:, :, rows, : first + size].transpose(1, 2)[real[:, rows]]
            close(ours.transpose(1, 2)[real[:, rows]], seen, "attentions")
        first += size


@pytest.mark.parametrize("attn", [{}, GQA, {"alibi": False}])
@pytest.mark.parametrize("pieces", [[70, 1, 1, 16, 33, 9], [128, 64, 1, 1], [1] * 3 + [16] * 7, [17, 200]])
@torch.no_grad()
def test_long_pieces_and_growth(pieces: list[int], attn: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a block of key norms and the first room; rows that begin in different pieces; norms from the middle on."""
    monkeypatch.setattr("mpt.cache.SKIPPING", 100)
    model, _, _ = model_and_weights(attn, {"max_seq_len": 300})
    model.eval()
    length = sum(pieces)
    ids, mask = torch.randint(0, 61, (4, length)), torch.ones(4, length, dtype=torch.bool)
    for masks in ({}, {"attention_mask": mask}):
        if masks:
            mask[0, :3], mask[2, :3], mask[3, : length - 2] = False, False, False
        expected = model(ids, **masks).logits
        logits, _, cache = read(model, ids, pieces, masks)
        close(logits[mask], expected[mask])
    assert cache.lengths == [length - 3, length, length - 3, 2]


@torch.no_grad()
def test_what_a_mask_left_out_is_remembered() -> None:
    """Steps without a mask: padding stays padding, left and between."""
    for attn in ({}, {"alibi": False}):
        model, _, _ = model_and_weights(attn, {"max_seq_len": 20})
        ids, mask = torch.randint(0, 61, (3, 14)), torch.ones(3, 14, dtype=torch.long)
        mask[0, :4], mask[1, 7:9], mask[2, :2], mask[2, 8] = 0, 0, 0, 0
        expected = model.eval()(ids, attention_mask=mask).logits
        cache = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True).past_key_values
        for i in range(9, 14):
            close(model(ids[:, i : i + 1], past_key_values=cache).logits[:, 0], expected[:, i])


@torch.no_grad()
def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 to 16 queries on keys without gaps go to decode_attention, more to flash_attention, with keys in place."""
    model = MptForCausalLM(MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=97)).eval()
    calls: list[tuple[str, int]] = []

    def record(name: str) -> None:
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda q, *a, **k: calls.append((name, len(q))) or kernel(q, *a, **k))

    record("decode_attention")
    record("flash_attention")
    ids, mask = torch.randint(0, 97, (2, 60)), torch.ones(2, 60, dtype=torch.bool)
    mask[0, :5] = False
    read(model, ids, [20, 1, 16, 17, 6], {"attention_mask": mask})
    flash, decode = ("flash_attention", 2), ("decode_attention", 2)
    rows = [("flash_attention", 1)] * 2  # ragged rows one by one
    assert calls == [flash] * 2 + [decode] * 4 + rows * 2 + [decode] * 2


@torch.no_grad()
def test_equals_transformers() -> None:
    """Left padding, a prompt, a piece of several tokens, steps; the tuple's order too."""
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": 97}
    theirs = TheirModel(TheirConfig(**shape)).eval()
    for p in theirs.parameters():
        p.copy_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.3) + (p.dim() == 1))
    ours = MptForCausalLM(MptConfig(**shape, use_cache=True)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids, mask, a, b, end = torch.randint(0, 97, (2, 20)), torch.ones(2, 20, dtype=torch.long), None, None, 0
    mask[1, :4] = 0
    for size in (10, 6, 1, 1, 2):
        end += size
        cut = {"input_ids": ids[:, end - size : end], "attention_mask": mask[:, :end], "output_hidden_states": True}
        x, y = ours(**cut, past_key_values=a, return_dict=False), theirs(**cut, past_key_values=b, use_cache=True)
        a, b = x[1], y.past_key_values
        assert isinstance(a, MptCache) and len(a) == end and list(y)[:2] == ["logits", "past_key_values"]
        assert torch.allclose(x[0][mask[:, end - size : end] == 1], y.logits[mask[:, end - size : end] == 1], atol=1e-4)
        assert len(x[2]) == 4 and len(x) == 3


def test_when_a_cache_is_made() -> None:
    ids = torch.randint(0, 97, (1, 5))
    for configured in (False, True):
        model = MptForCausalLM(MptConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=97, use_cache=configured))
        assert ("past_key_values" in model.eval()(ids)) is configured
        assert "past_key_values" not in model.train()(ids) and "past_key_values" not in model(ids, labels=ids)
        assert "past_key_values" not in model.eval()(ids, use_cache=False)
        assert "past_key_values" in model.train()(ids, use_cache=True)
        assert "past_key_values" in model.transformer.eval()(ids, past_key_values=MptCache())
        model.train().transformer.set_activation_checkpointing("full")
        with pytest.raises(ValueError, match="use_cache with activation checkpointing"):
            model(ids, use_cache=True)


def test_gradients_reach_the_call_not_what_the_cache_holds() -> None:
    """As if the past were constants: the gradient of a piece's embeddings, by hand from a run at once."""
    model, _, _ = model_and_weights(GQA, {})
    ids, mask = torch.randint(0, 61, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = False
    x = model.transformer.wte(ids).detach()
    for first in (11, 9):
        piece = x[:, first:].clone().requires_grad_()
        cache = model.eval()(inputs_embeds=x[:, :first], attention_mask=mask[:, :first], use_cache=True).past_key_values
        model(inputs_embeds=piece, past_key_values=cache, attention_mask=mask).logits[:, -1].sum().backward()
        whole = x[:, first:].clone().requires_grad_()
        out = model(inputs_embeds=torch.cat((x[:, :first], whole), 1), attention_mask=mask)
        out.logits[:, -1].sum().backward()
        close(piece.grad, whole.grad)


@torch.no_grad()
def test_crop_repeat_and_copy() -> None:
    model, _, _ = model_and_weights({}, {})
    model.eval()
    ids, mask = torch.randint(0, 61, (2, 13)), torch.ones(2, 13, dtype=torch.bool)
    mask[0, :3], mask[1, 6:8] = False, False
    expected = model(ids, attention_mask=mask).logits
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    cache.crop(8)
    assert cache.lengths == [5, 8] and cache.holes
    close(model(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:])
    cache.crop(5)
    assert not cache.holes
    close(
        model(ids[:, 5:], past_key_values=cache, attention_mask=mask).logits[mask[:, 5:]], expected[:, 5:][mask[:, 5:]]
    )
    other.crop(9)
    other.repeat_interleave(2)
    close(model(ids.repeat_interleave(2, 0)[:, 9:], past_key_values=other).logits[1::2], expected[:, 9:])
    assert other.batch_size == 4 and cache.batch_size == 2
    other.crop(0)
    close(
        model(ids.repeat_interleave(2, 0), past_key_values=other, attention_mask=mask.repeat_interleave(2, 0)).logits[
            mask.repeat_interleave(2, 0)
        ],
        expected.repeat_interleave(2, 0)[mask.repeat_interleave(2, 0)],
    )
    with pytest.raises(ValueError, match=r"crop\(14\): the cache holds 13 columns"):
        other.crop(14)


@torch.no_grad()
def test_room() -> None:
    """Asked for room is taken once; without, a text of n tokens is moved a logarithmic number of times."""
    model = MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=97)).eval()
    for capacity, most in ((400, 1), (0, 6)):
        cache, places = MptCache(capacity), set()
        for _ in range(400):
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
            places.add(cache._layers[0].k.data_ptr())
        assert len(places) <= most and cache._layers[0].k.shape[2] <= 600
        assert cache.memory() == sum(t.nbytes for t in cache._layers[0])
    assert MptCache().memory() == 0
    with pytest.raises(ValueError, match="capacity is -1"):
        MptCache(-1)


@torch.no_grad()
def test_autocast_keeps_the_cache_in_its_dtype() -> None:
    model = MptForCausalLM(MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=97, initializer_range=0.1)).eval()
    ids = torch.randint(0, 97, (2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, cache = read(model, ids, [5, 1, 6], {})
    assert cache._layers[0].k.dtype == torch.bfloat16
    assert (logits.float() - model(ids).logits).abs().max() < 0.05 * logits.abs().max()
    with pytest.raises(ValueError, match=r"holds torch.bfloat16 and the model now computes keys in torch.float32"):
        model(ids[:, :1], past_key_values=cache)
    assert len(cache) == 12  # a call that failed adds nothing


def refused(message: str, **kwargs) -> None:
    model = MptForCausalLM(MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=97)).eval()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    cache = model(torch.zeros(2, 5, dtype=torch.long), attention_mask=mask, use_cache=True).past_key_values
    model = copy.deepcopy(model) if kwargs.pop("other_model", False) else model
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": torch.zeros(2, 1, dtype=torch.long), "past_key_values": cache} | kwargs))
    assert len(cache) == 5


def test_refuses() -> None:
    refused("past_key_values was filled by another model", other_model=True)
    refused("holds 2 rows and the input has 3", input_ids=torch.zeros(3, 1, dtype=torch.long))
    refused(r"attention_mask is \(2, 1\); it must be \(B, past \+ S\) = \(2, 6\)", attention_mask=torch.ones(2, 1))
    refused("calls column 0 of row 1 real; it was left padding", attention_mask=torch.ones(2, 6))
    refused(
        r"cache_position is 4\.\.4; past_key_values holds 5 columns, so it must be 5\.\.5",
        cache_position=torch.tensor([4]),
    )
    refused(r"cache_position is \(2,\); it must be \(S,\) = \(1,\)", cache_position=torch.tensor([4, 5]))
    refused("past_key_values is tuple; pass an MptCache", past_key_values=((), ()))
    refused("input_ids hold 97", input_ids=torch.full((2, 1), 97))


def test_learned_positions_end() -> None:
    model, _, _ = model_and_weights({"alibi": False}, {})
    cache = model.eval()(torch.zeros(1, 16, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="17 positions and max_seq_len is 16"):
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)


@torch.no_grad()
def test_key_norms_are_taken_where_a_cache_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the length on at which decoding skips: of all keys so far, then of the new ones, ragged rows and all."""
    monkeypatch.setattr("mpt.cache.SKIPPING", 128)
    model = MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64)).eval()
    ids = torch.randint(64, (3, 300))
    mask = torch.arange(300) >= torch.tensor([[0], [40], [71]])
    cache, end = MptCache(320), 0
    for size in [100, 27, 1, 1, 70, 1, -60, -50, 20, 1, 80]:  # below 0: cropped
        if size < 0:
            cache.crop(end + size)
        else:
            model(ids[:, end : end + size], attention_mask=mask[:, : end + size], past_key_values=cache)
        end += size
        if end < 128 or size < 0:
            continue
        k, _, norms = cache._layers[0]
        for row, length in enumerate(cache.lengths):
            blocks = -(-length // 64)
            expected = torch.stack(
                [k[row, :, : min((c + 1) * 64, length)].norm(dim=-1).amax(1) for c in range(blocks)], 1
            )
            torch.testing.assert_close(norms[row, :, :blocks], expected)
