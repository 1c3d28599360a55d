"""Generation: prompts continued token by token, greedily or by sampling, to an end token, a stop string or a length."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mpt.cache import MptCache
from mpt.model import FOREIGN_INPUTS, refuse_unknown

if TYPE_CHECKING:
    from mpt.heads import MptForCausalLM


PREFILL = 2048  # tokens of a prompt that are read at once, over all rows
ROOM = 4096  # new tokens that a cache is made for in advance
# Of transformers' generate: what to do instead here.
BEAMS = "there is no beam search; leave it out"
ONE_BY_ONE = "pass the arguments themselves, such as max_new_tokens and do_sample"
FOREIGN_ARGUMENTS = FOREIGN_INPUTS | {
    "inputs": "its name is input_ids",
    "inputs_embeds": "prompts are token ids: pass input_ids",
    "token_type_ids": "a row is one text; leave it out",
    "max_length": "pass max_new_tokens, which counts new tokens only",
    "min_length": "there is no least length; leave it out",
    "min_new_tokens": "there is no least length; leave it out",
    "num_beams": BEAMS,
    "num_beam_groups": BEAMS,
    "length_penalty": BEAMS,
    "early_stopping": BEAMS,
    "generation_config": ONE_BY_ONE,
    "logits_processor": ONE_BY_ONE,
    "stopping_criteria": "pass eos_token_id, or stop_strings with tokenizer",
    "return_dict_in_generate": "it returns the ids; for scores call the model on them",
    "output_scores": "it returns the ids; for scores call the model on them",
}
LONGEST_CHARACTER = 5  # tokens whose text may wait: a character has up to 4 bytes


class Streamer(Protocol):
    """Receives the prompt (B, S), then every step's tokens (B,), on the CPU, then the end; transformers' streamers are
    such.
    """

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class TextDecoder(Protocol):
    """A tokenizer, of `tokenizers` or of transformers, as far as stop strings need one."""

    def decode(self, ids: list[int]) -> str: ...


@torch.no_grad()
def generate(
    model: "MptForCausalLM",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: TextDecoder | None = None,
    num_return_sequences: int = 1,
    seed: int | None = None,
    streamer: Streamer | None = None,
    use_cache: bool = True,
    past_key_values: MptCache | None = None,
    **kwargs: Any,
) -> Tensor:
    """Continue each row of input_ids (B, S): (B * num_return_sequences, S + new tokens), prompts included, left-padded.

    attention_mask: (B, S), 1 where a token is real. Right-padded rows are rolled to left padding, so that each row
        gives what it gives alone.
    do_sample: False takes the likeliest token; True draws one, after temperature, top_k and top_p, in this order.
    top_k: keep the k likeliest. top_p: keep the likeliest that together reach p (Holtzman et al. 2020).
    repetition_penalty: above 1, tokens already in the row become less likely (Keskar et al. 2019); greedy too.
    eos_token_id: an id or several that end a row; None: the configuration's.
    pad_token_id: what follows the end of a row; None: the configuration's, else the first end token, else 0.
    stop_strings: a row ends, too, once its new text holds one of them; needs `tokenizer`.
    seed: of the draws; None takes one from torch's generator.
    streamer: receives the prompt and each step's tokens.
    use_cache: False computes every step from all tokens again: the same tokens, slowly.
    past_key_values: a cache of the first columns of input_ids, from an earlier call on them; the rest is read, and the
        cache then holds all but the last token. An empty one is filled.

    A prompt is read in pieces of PREFILL tokens of all rows together, which bounds memory at any length; with prefix_lm
    at once, since it sees itself both ways.
    The token that ends a row is kept. The model runs in eval mode and is left as it was. ValueError names the argument
    that does not fit, TypeError one that does not exist.
    """
    refuse_unknown(generate, kwargs, FOREIGN_ARGUMENTS)
    _check_prompt(model, input_ids, attention_mask, max_new_tokens)
    _check_numbers(do_sample, temperature, top_k, top_p, repetition_penalty, num_return_sequences, seed)
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if stops and tokenizer is None:
        raise ValueError("stop_strings are given without tokenizer; pass the one that decodes the ids")
    if any(not isinstance(stop, str) or not stop for stop in stops):
        raise ValueError(f"stop_strings are {stop_strings!r}; each must be a text, and not empty")
    vocab_size = model.config.vocab_size
    ends = _ids("eos_token_id", model.config.eos_token_id if eos_token_id is None else eos_token_id, vocab_size)
    _ids("pad_token_id", pad_token_id, vocab_size)
    pad = next(i for i in (pad_token_id, model.config.pad_token_id, *ends, 0) if i is not None)

    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    _check_cache(input_ids, mask, use_cache, past_key_values, num_return_sequences)
    ids, mask = _left_padded(input_ids, mask, pad)
    reader = _Reader(model, ids, mask, past_key_values or (MptCache() if use_cache else None))
    if reader.cache is not None and len(reader.cache) == 0:
        reader.cache.capacity = ids.shape[1] + min(max_new_tokens, ROOM)
    ids, mask = (t.repeat_interleave(num_return_sequences, 0) for t in (ids, mask))
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    end_ids = torch.tensor(ends, device=ids.device, dtype=ids.dtype)
    watches = [StopWatch(stops, tokenizer) for _ in ids] if stops and tokenizer is not None else []
    seen = None if repetition_penalty == 1 else _seen(ids, mask, vocab_size)
    generator = torch.Generator(ids.device)
    generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
    if streamer is not None:
        streamer.put(ids.cpu())

    was_training = model.training
    model.eval()
    try:
        token: Tensor | None = None
        for _ in range(max_new_tokens):
            scores = reader.read_prompt(num_return_sequences) if token is None else reader.read(token)
            if not scores.sum().isfinite():
                raise ValueError(
                    f"the model's logits are not finite: its weights are damaged, or overflow in {model.dtype}"
                )
            if seen is not None:
                scores = _penalised(scores, seen, repetition_penalty)
            token = _sample(scores, temperature, top_k, top_p, generator) if do_sample else scores.argmax(-1)
            token = token.masked_fill(finished, pad)
            ids = torch.cat((ids, token[:, None]), 1)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if streamer is not None:
                streamer.put(token.cpu())
            finished |= torch.isin(token, end_ids)
            if watches:
                met = [not done and w.met(t) for done, w, t in zip(finished.tolist(), watches, token.tolist())]
                finished |= torch.tensor(met, device=ids.device)
            if finished.all():
                break
    finally:
        model.train(was_training)
    if streamer is not None:
        streamer.end()
    return ids


def _check_prompt(
    model: "MptForCausalLM", input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int
) -> None:
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(given, Tensor) and (given is not None or name == "input_ids"):
            raise ValueError(f"{name} is a {type(given).__name__}; it must be a tensor (B, S)")
    config = model.config
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids are {tuple(input_ids.shape)}; they must be (B, S) with at least one token in each row"
        )
    for worst in input_ids.aminmax():
        if not 0 <= worst < config.vocab_size:
            raise ValueError(f"input_ids hold {worst}; ids must be in 0..{config.vocab_size - 1} (vocab_size - 1)")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; it must be as input_ids, {tuple(input_ids.shape)}"
            )
        if not (real := attention_mask.bool().any(1)).all():
            raise ValueError(
                f"attention_mask has no real token in row {int(real.int().argmin())}; every row needs a prompt"
            )
    _check_number("max_new_tokens", max_new_tokens, int, "must be a whole number, 0 or more", lambda n: n >= 0)
    longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.bool().sum(1).max())
    if model.transformer.wpe is not None and longest + max_new_tokens - 1 > config.max_seq_len:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} go past max_seq_len "
            f"{config.max_seq_len}, where learned positions end"
        )


def _check_numbers(
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float,
    repetition_penalty: float,
    num_return_sequences: int,
    seed: int | None,
) -> None:
    if do_sample:
        advice = "must be positive (for the likeliest token, do_sample=False)"
        _check_number("temperature", temperature, float, advice, lambda t: 0 < t < math.inf)
    if top_k is not None:
        _check_number("top_k", top_k, int, "must be a whole number, at least 1 (None: no limit)", lambda k: k >= 1)
    _check_number("top_p", top_p, float, "must be in (0, 1] (1: no limit)", lambda p: 0 < p <= 1)
    _check_number(
        "repetition_penalty", repetition_penalty, float, "must be positive (1: none)", lambda r: 0 < r < math.inf
    )
    _check_number(
        "num_return_sequences", num_return_sequences, int, "must be a whole number, at least 1", lambda n: n >= 1
    )
    if num_return_sequences > 1 and not do_sample:
        raise ValueError(
            f"num_return_sequences is {num_return_sequences}; more than 1 needs do_sample=True, or rows would be equal"
        )
    if seed is not None:
        _check_number("seed", seed, int, "must be a whole number of 64 bits", lambda n: -(2**63) <= n < 2**64)


def _check_number(name: str, value: Any, kind: type, advice: str, fits: Callable[[Any], bool]) -> None:
    known = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not known or not fits(value):
        raise ValueError(f"{name} is {value!r}; it {advice}")


def _check_cache(ids: Tensor, mask: Tensor, use_cache: bool, cache: MptCache | None, sequences: int) -> None:
    if cache is None:
        return
    if not use_cache:
        raise ValueError("use_cache is False and past_key_values is given; leave one of them out")
    if sequences > 1:
        raise ValueError(
            f"num_return_sequences is {sequences} with past_key_values, whose rows would multiply; repeat the rows of "
            "input_ids instead"
        )
    if len(cache) >= ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {len(cache)} columns and input_ids {ids.shape[1]}; give the whole text, with what "
            "is cached and at least one token more (or crop the cache)"
        )
    if len(cache) and not mask[:, -1].all():
        raise ValueError("attention_mask pads rows on the right and past_key_values is given; pad on the left")


def _ids(name: str, given: int | Sequence[int] | Tensor | None, vocab_size: int) -> list[int]:
    given = given.tolist() if isinstance(given, Tensor) else given
    ids = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    if any(not isinstance(i, Integral) or not 0 <= i < vocab_size for i in ids):
        raise ValueError(f"{name} is {given!r}; ids must be in 0..{vocab_size - 1} (vocab_size - 1)")
    return ids


def _left_padded(ids: Tensor, mask: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Each row rolled right past the padding at its end; padding filled with `pad`."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    shift = ids.shape[1] - 1 - (mask * columns).amax(1, keepdim=True)
    source = (columns - shift) % ids.shape[1]
    mask = mask.gather(1, source)
    return ids.gather(1, source).masked_fill(~mask, pad), mask


class _Reader:
    """Gives the model what is new, and gets fp32 logits (B, V) of the token after each row."""

    def __init__(self, model: "MptForCausalLM", ids: Tensor, mask: Tensor, cache: MptCache | None) -> None:
        self.model, self.ids, self.mask, self.cache = model, ids, mask, cache
        self.prefix_lm, self.prompt = model.config.attn_config.prefix_lm, ids.shape[1]

    def read_prompt(self, repeats: int) -> Tensor:
        """Of the prompt, whose rows are from now on there `repeats` times."""
        if self.cache is None:
            self.ids, self.mask = (t.repeat_interleave(repeats, 0) for t in (self.ids, self.mask))
            return self._whole()
        piece = self.prompt if self.prefix_lm else max(PREFILL // len(self.ids), 1)
        for first in range(len(self.cache), self.prompt, piece):
            end = min(first + piece, self.prompt)
            scores = self._cached(self.ids[:, first:end], self.mask[:, :end])
        if repeats > 1:
            self.cache.repeat_interleave(repeats)
            scores = scores.repeat_interleave(repeats, 0)
        return scores

    def read(self, token: Tensor) -> Tensor:
        """Of the rows with one more token (B,) each."""
        if self.cache is not None:
            return self._cached(token[:, None], None)
        self.ids = torch.cat((self.ids, token[:, None]), 1)
        self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), 1)
        return self._whole()

    def _cached(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        assert self.cache is not None
        prefix = ids.new_ones(len(ids), len(self.cache) + ids.shape[1]) if self.prefix_lm else None
        return self._scores(ids, mask, prefix)

    def _whole(self) -> Tensor:
        prefix = None
        if self.prefix_lm:
            # The prompt sees itself both ways, a generated token all before it: what a cache gives.
            prefix = torch.zeros_like(self.mask)
            prefix[:, : self.prompt] = True
        return self._scores(self.ids, self.mask, prefix)

    def _scores(self, ids: Tensor, mask: Tensor | None, prefix: Tensor | None) -> Tensor:
        out = self.model(
            ids,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            attention_mask=mask,
            prefix_mask=prefix,
            logits_to_keep=1,
            return_logits=True,
            return_dict=True,
        )
        return out.logits[:, -1].float()


def _seen(ids: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    """(B, V) bool: the tokens that a row holds."""
    seen = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device)
    rows, columns = mask.nonzero(as_tuple=True)
    seen[rows, ids[rows, columns]] = True
    return seen


def _penalised(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _sample(scores: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> Tensor:
    # The likeliest is 0, so that none overflows; below the floor only ties are left to draw from.
    scores = (scores - scores.amax(-1, keepdim=True)) / max(temperature, 1e-6)
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what precedes it reaches top_p already; never the first
        scores = scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


class TextStream:
    """Text from token ids that come one by one, without decoding all of them again.

    A token may be part of a character: its text then waits for the rest. Decoding begins a few tokens back, since a
    token's text may depend on the one before it.
    """

    def __init__(self, tokenizer: TextDecoder) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []  # of which the first `_known` tokens' text is out
        self._known = 0

    def put(self, token: int) -> str:
        """The text that is complete with this token and was not given yet."""
        self._ids.append(token)
        text = self.pending()
        if text.endswith("\ufffd") and len(self._ids) - self._known < LONGEST_CHARACTER:
            return ""
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return text

    def pending(self) -> str:
        """The text that was not given yet, an incomplete character in it as U+FFFD."""
        known = self.tokenizer.decode(self._ids[: self._known])
        return self.tokenizer.decode(self._ids)[len(known) :]


class StopWatch:
    """Whether one row's new text holds a stop string, told token by token."""

    def __init__(self, stops: Sequence[str], tokenizer: TextDecoder) -> None:
        self.stops, self._stream, self._tail = stops, TextStream(tokenizer), ""
        self._keep = max(map(len, stops)) - 1

    def met(self, token: int) -> bool:
        """True once the text up to this token holds one of the strings."""
        text = self._tail + self._stream.put(token)
        self._tail = text[len(text) - self._keep :] if self._keep < len(text) else text
        whole = text + self._stream.pending()
        return any(stop in whole for stop in self.stops)
