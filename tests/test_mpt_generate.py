"""Generation: equal to transformers' where both can, each control against its definition, padding, stopping, errors."""

import pytest
import torch
from torch import Tensor
from transformers import MptConfig as TheirConfig
from transformers import MptForCausalLM as TheirModel

from mpt import MptCache, MptConfig, MptForCausalLM
from mpt import generate as generation
from mpt.generate import TextStream, _sample

SHAPE = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 40}


def model(attn: dict | None = None, **extra) -> MptForCausalLM:
    """With weights so large that greedy choices are clear."""
    out = MptForCausalLM(MptConfig(**(SHAPE | extra), attn_config=attn, initializer_range=0.2)).eval()
    return out


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_equals_transformers(penalty: float) -> None:
    ours = model()
    theirs = TheirModel(TheirConfig(**SHAPE)).eval()
    theirs.load_state_dict(ours.state_dict() | {"lm_head.weight": ours.transformer.wte.weight})
    ids, mask = torch.randint(1, 97, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    flags = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": penalty, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, mask, **flags), theirs.generate(ids, attention_mask=mask, **flags))
    if penalty == 1:  # transformers penalises padding as if it were text
        mask[0, :3] = 0
        ids[0, :3] = 0
        assert torch.equal(ours.generate(ids, mask, **flags), theirs.generate(ids, attention_mask=mask, **flags))


@pytest.mark.parametrize("attn", [{}, {"alibi": False}, {"prefix_lm": True}, {"attn_uses_sequence_id": True}])
def test_padded_rows_equal_their_unpadded_runs(attn: dict) -> None:
    ours = model(attn).train()  # generation turns dropout and required ids off, and leaves the mode as it was
    ids = torch.randint(1, 97, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4], mask[1, 6:], mask[2, :2], mask[2, 7:] = 0, 0, 0, 0
    for flags in ({}, {"repetition_penalty": 1.5}):
        out = ours.generate(ids, mask, max_new_tokens=7, pad_token_id=5, **flags)
        assert out.shape == (3, 16) and ours.training
        for row, (a, b) in enumerate(((4, 9), (0, 6), (2, 7))):
            alone = ours.generate(ids[row : row + 1, a:b], max_new_tokens=7, **flags)[0]
            assert torch.equal(out[row, -len(alone) :], alone)
            assert (out[row, : -len(alone)] == 5).all()


def test_prefix_lm_sees_the_prompt_both_ways() -> None:
    """Greedy steps by hand: prompt keys are seen by all, generated ones by later queries only."""
    ours = model({"prefix_lm": True})
    ids = torch.randint(1, 97, (2, 6))
    out = ours.generate(ids, max_new_tokens=5)
    for step in range(5):
        prefix = torch.zeros(2, 6 + step, dtype=torch.bool)
        prefix[:, :6] = True
        ids = torch.cat((ids, ours(ids, prefix_mask=prefix).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, ids)


def test_end_tokens_and_padding() -> None:
    ours = model()
    ids = torch.randint(1, 97, (2, 5))
    free = ours.generate(ids, max_new_tokens=10)
    end = int(free[0, 7])
    first = [row.tolist().index(end, 5) if end in row[5:].tolist() else 15 for row in free]
    out = ours.generate(ids, max_new_tokens=10, eos_token_id=[end, 96], pad_token_id=0)
    for row in range(2):
        stop = min(first[row], next((i for i in range(5, 15) if free[row, i] == 96), 15))
        assert torch.equal(out[row, : stop + 1], free[row, : stop + 1])
        assert (out[row, stop + 1 :] == 0).all()
    ours.config.eos_token_id = end
    assert torch.equal(ours.generate(ids[:1], max_new_tokens=10), free[:1, : first[0] + 1])
    assert torch.equal(ours.generate(ids, max_new_tokens=0), ids)


class Letters:
    """A tokenizer whose token i is the i-th character."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)


def test_stop_strings() -> None:
    ours, letters = model(), Letters()
    ids = torch.randint(1, 97, (2, 5))
    free = ours.generate(ids, max_new_tokens=10)
    stop = letters.decode(free[0, 6:8].tolist())
    out = ours.generate(ids[:1], max_new_tokens=10, stop_strings=stop, tokenizer=letters)
    text = letters.decode(out[0, 5:].tolist())
    assert text.endswith(stop) and text.count(stop) == 1 and torch.equal(out[0], free[0, : out.shape[1]])
    both = ours.generate(ids, max_new_tokens=10, stop_strings=[stop, "x"], tokenizer=letters, pad_token_id=0)
    assert torch.equal(both[0, : out.shape[1]], out[0]) and not both[0, out.shape[1] :].any()
    with pytest.raises(ValueError, match="stop_strings are given without tokenizer"):
        ours.generate(ids, stop_strings="x")


def test_streamer() -> None:
    class Collect:
        def __init__(self) -> None:
            self.parts: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.parts.append(value)

        def end(self) -> None:
            self.ended = True

    ours, streamer = model(), Collect()
    ids = torch.randint(1, 97, (1, 5))
    out = ours.generate(ids, max_new_tokens=4, streamer=streamer)
    assert streamer.ended and torch.equal(streamer.parts[0], ids)
    assert [int(t) for t in streamer.parts[1:]] == out[0, 5:].tolist()


def test_seeds_and_returned_sequences() -> None:
    ours = model()
    ids = torch.randint(1, 97, (2, 5))
    flags = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    one = ours.generate(ids, seed=3, num_return_sequences=3, **flags)
    assert one.shape == (6, 13) and torch.equal(one[:, :5], ids.repeat_interleave(3, 0))
    assert torch.equal(one, ours.generate(ids, seed=3, num_return_sequences=3, **flags))
    assert not torch.equal(one, ours.generate(ids, seed=4, num_return_sequences=3, **flags))
    assert len({tuple(row.tolist()) for row in one}) > 2
    torch.manual_seed(0)
    free = ours.generate(ids, **flags)
    torch.manual_seed(0)
    assert torch.equal(free, ours.generate(ids, **flags))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.5, None, 1.0), (2.0, 3, 1.0), (1.0, None, 0.7), (1.0, 4, 0.6)],
)
def test_sampling_follows_its_distribution(temperature: float, top_k: int | None, top_p: float) -> None:
    """Frequencies of 20,000 draws against probabilities worked out one token at a time."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5])
    p = (logits / temperature).softmax(0).tolist()
    order = sorted(range(6), key=lambda i: -p[i])[: top_k or 6]
    total, kept = sum(p[i] for i in order), []
    for i in order:
        kept.append(i)
        if sum(p[j] for j in kept) / total >= top_p:
            break
    expected = [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(6)]
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    draws = _sample(logits.expand(n, 6), temperature, top_k, top_p, generator)
    counts = torch.bincount(draws, minlength=6).tolist()
    for count, chance in zip(counts, expected, strict=True):
        assert abs(count / n - chance) <= 5 * (chance * (1 - chance) / n) ** 0.5


GQA = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True, "clip_qkv": 2}


@pytest.mark.parametrize("attn", [{}, GQA, {"alibi": False}, {"prefix_lm": True}, {"attn_uses_sequence_id": True}])
def test_a_cache_changes_no_token(attn: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unequal length read in pieces, padding on both sides; greedy, penalised, and drawn."""
    ours = model(attn, max_seq_len=60).double()
    ids, mask = torch.randint(1, 97, (3, 23)), torch.ones(3, 23, dtype=torch.long)
    mask[0, :11], mask[1, 15:], mask[2, :1], mask[2, 20:] = 0, 0, 0, 0
    draws = {"do_sample": True, "seed": 3, "num_return_sequences": 2}
    for flags in ({}, {"repetition_penalty": 1.4}, draws):
        without = ours.generate(ids, mask, max_new_tokens=10, use_cache=False, **flags)
        for piece in (2048, 9, 3):
            monkeypatch.setattr(generation, "PREFILL", piece)
            assert torch.equal(ours.generate(ids, mask, max_new_tokens=10, **flags), without)


def test_what_the_model_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt in pieces, then one token at a time, with one row of logits each."""
    ours, given = model(max_seq_len=8), []
    forward = MptForCausalLM.forward

    def record(self, ids: Tensor, **kwargs):
        out = forward(self, ids, **kwargs)
        given.append((ids.shape[1], out.logits.shape[1]))
        return out

    monkeypatch.setattr(MptForCausalLM, "forward", record)
    monkeypatch.setattr(generation, "PREFILL", 20)
    ours.generate(torch.randint(1, 97, (2, 25)), max_new_tokens=4)  # ALiBi: far beyond max_seq_len
    assert given == [(10, 1), (10, 1), (5, 1), (1, 1), (1, 1), (1, 1)]


def test_going_on_with_a_cache() -> None:
    ours, cache = model().double(), MptCache()
    ids = torch.randint(1, 97, (2, 5))
    first = ours.generate(ids, max_new_tokens=6, past_key_values=cache)
    assert len(cache) == 10
    text = torch.cat((first, torch.randint(1, 97, (2, 3))), 1)
    assert torch.equal(
        ours.generate(text, max_new_tokens=6, past_key_values=cache), ours.generate(text, max_new_tokens=6)
    )
    refused = [
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2 with past_key_values"),
        ({"use_cache": False}, "use_cache is False and past_key_values is given"),
        ({"input_ids": text}, "past_key_values holds 19 columns and input_ids 14; give the whole text"),
        ({"attention_mask": torch.tensor([[1] * 20, [1] * 19 + [0]])}, "pads rows on the right"),
        ({"input_ids": torch.ones(1, 20, dtype=torch.long)}, "holds 2 rows and the input has 1"),
    ]
    for kwargs, message in refused:
        with pytest.raises(ValueError, match=message):
            ours.generate(**({"input_ids": torch.ones(2, 20, dtype=torch.long), "past_key_values": cache} | kwargs))


class Bytes:
    """A tokenizer of bytes, which counts what it decodes."""

    decoded = 0

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        return bytes(ids).decode(errors="replace")


def test_text_comes_in_whole_characters_at_constant_cost() -> None:
    tokenizer = Bytes()
    stream, text = TextStream(tokenizer), "aß€🙂" * 500
    parts = [stream.put(b) for b in text.encode()]
    assert "".join(parts) == text and parts[:6] == ["a", "", "ß", "", "", "€"]
    assert tokenizer.decoded < 20 * len(parts)
    assert stream.put(0xE2) == "" and stream.pending() == "\ufffd"


def test_stop_strings_across_tokens_at_constant_cost() -> None:
    """A stop string is seen wherever its tokens begin; as before where the text so far is decoded whole each time."""
    for stop in ("b", "ab", "€🙂", "ßaß", "xx"):
        tokenizer = Bytes()
        data = ("aß€🙂b" * 3).encode()
        watch = generation.StopWatch([stop, "never there"], tokenizer)
        met = [watch.met(byte) for byte in data]
        first = next((i for i in range(len(data)) if stop in data[: i + 1].decode(errors="replace")), None)
        assert (met.index(True) if True in met else None) == first
        assert tokenizer.decoded < 40 * len(data)


IDS = torch.arange(10).view(2, 5)
REFUSED = [
    ({"input_ids": IDS[0]}, r"input_ids are \(5,\)"),
    ({"input_ids": IDS[:, :0]}, r"input_ids are \(2, 0\)"),
    ({"attention_mask": torch.ones(2, 4)}, r"attention_mask is \(2, 4\)"),
    ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "no real token in row 1"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"do_sample": True, "temperature": 0}, "temperature is 0"),
    ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
    ({"do_sample": True, "temperature": None}, "temperature is None"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_k": 5.0}, r"top_k is 5\.0; it must be a whole number"),
    ({"top_p": 1.5}, r"top_p is 1\.5"),
    ({"top_p": 0}, "top_p is 0"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
    ({"num_return_sequences": 0}, "num_return_sequences is 0; it must be a whole number"),
    ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number of 64 bits"),
    ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
    ({"eos_token_id": [3, 97]}, r"eos_token_id is \[3, 97\]; ids must be in 0\.\.96"),
    ({"eos_token_id": "3"}, "eos_token_id is '3'"),
    ({"pad_token_id": -1}, "pad_token_id is -1"),
    ({"stop_strings": ["a", ""], "tokenizer": "any"}, r"stop_strings are \['a', ''\]; each must be a text"),
    ({"input_ids": [[1, 2]]}, "input_ids is a list; it must be a tensor"),
    ({"attention_mask": [[1] * 5] * 2}, "attention_mask is a list; it must be a tensor"),
    ({"input_ids": IDS + 90, "repetition_penalty": 2.0}, r"input_ids hold 99; ids must be in 0\.\.96"),
    ({"num_return_sequences": 2, "max_new_tokens": 3}, "num_return_sequences is 2; more than 1 needs do_sample=True"),
    ({"max_new_tokens": 37}, "a prompt of 5 tokens and max_new_tokens 37 go past max_seq_len 40"),
]


@pytest.mark.parametrize(("kwargs", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refuses(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model({"alibi": False}).generate(**({"input_ids": IDS, "max_new_tokens": 3} | kwargs))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("max_new_token", r"did you mean 'max_new_tokens'\?"),
        ("max_length", "pass max_new_tokens, which counts new tokens only"),
        ("num_beams", "there is no beam search"),
        ("generation_config", "pass the arguments themselves"),
        ("position_ids", "positions follow from attention_mask"),
        ("qqq", "it has input_ids, attention_mask, max_new_tokens, .*past_key_values$"),
    ],
)
def test_unknown_arguments(name: str, advice: str) -> None:
    with pytest.raises(TypeError, match=rf"generate\(\) has no argument '{name}'; {advice}"):
        model().generate(IDS, **{name: 4})


def test_logits_that_are_not_finite() -> None:
    broken = model()
    broken.transformer.norm_f.weight.data[3] = torch.nan
    for draw in (True, False):
        with pytest.raises(
            ValueError, match=r"logits are not finite: its weights are damaged, or overflow in torch.fl"
        ):
            broken.generate(IDS, max_new_tokens=3, do_sample=draw)


def test_a_temperature_near_zero_is_greedy() -> None:
    ours = model()
    for temperature in (1e-3, 1e-20, 1e-45):
        drawn = ours.generate(IDS, max_new_tokens=4, do_sample=True, temperature=temperature)
        assert torch.equal(drawn, ours.generate(IDS, max_new_tokens=4))


def test_learned_positions_run_to_their_end() -> None:
    ours = model({"alibi": False})
    assert ours.generate(IDS, max_new_tokens=36).shape == (2, 41)
