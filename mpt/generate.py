"""Generation: prompts continued token by token, greedily or by sampling, to an end token, a stop string or a length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mpt.heads import MptForCausalLM


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

    The token that ends a row is kept. The model runs in eval mode and is left as it was. ValueError names the argument
    that does not fit.
    """
    _check(model, input_ids, attention_mask, max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty)
    if num_return_sequences < 1 or (num_return_sequences > 1 and not do_sample):
        raise ValueError(
            f"num_return_sequences is {num_return_sequences}; more than 1 needs do_sample=True, or rows would be equal"
        )
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if stops and tokenizer is None:
        raise ValueError("stop_strings are given without tokenizer; pass the one that decodes the ids")
    ends = _ids(model.config.eos_token_id if eos_token_id is None else eos_token_id)
    pad = next(i for i in (pad_token_id, model.config.pad_token_id, *ends, 0) if i is not None)

    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    ids, mask = _left_padded(input_ids, mask, pad)
    ids, mask = (t.repeat_interleave(num_return_sequences, 0) for t in (ids, mask))
    prompt = ids.shape[1]
    end_ids = torch.tensor(ends, device=ids.device, dtype=ids.dtype)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    generator = torch.Generator(ids.device)
    generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
    if streamer is not None:
        streamer.put(ids.cpu())

    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            scores = _next_scores(model, ids, mask, prompt)
            scores = _penalised(scores, ids, mask, repetition_penalty)
            token = _sample(scores, temperature, top_k, top_p, generator) if do_sample else scores.argmax(-1)
            token = token.masked_fill(finished, pad)
            ids = torch.cat((ids, token[:, None]), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            if streamer is not None:
                streamer.put(token.cpu())
            finished |= torch.isin(token, end_ids)
            if stops:
                assert tokenizer is not None
                finished |= _holds_stop(ids[:, prompt:], finished, stops, tokenizer)
            if finished.all():
                break
    finally:
        model.train(was_training)
    if streamer is not None:
        streamer.end()
    return ids


def _check(
    model: "MptForCausalLM",
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float,
    repetition_penalty: float,
) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids are {tuple(input_ids.shape)}; they must be (B, S) with at least one token in each row"
        )
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; it must be as input_ids, {tuple(input_ids.shape)}"
            )
        if not (real := attention_mask.bool().any(1)).all():
            raise ValueError(
                f"attention_mask has no real token in row {int(real.int().argmin())}; every row needs a prompt"
            )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must not be negative")
    if do_sample and temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; it must be positive (for the likeliest token, do_sample=False)"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1 (None: no limit)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be positive (1: none)")
    longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.bool().sum(1).max())
    config = model.config
    if model.transformer.wpe is not None and longest + max_new_tokens - 1 > config.max_seq_len:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} go past max_seq_len "
            f"{config.max_seq_len}, where learned positions end"
        )


def _ids(given: int | Sequence[int] | None) -> list[int]:
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def _left_padded(ids: Tensor, mask: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Each row rolled right past the padding at its end; padding filled with `pad`."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    shift = ids.shape[1] - 1 - (mask * columns).amax(1, keepdim=True)
    source = (columns - shift) % ids.shape[1]
    mask = mask.gather(1, source)
    return ids.gather(1, source).masked_fill(~mask, pad), mask


def _next_scores(model: "MptForCausalLM", ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """fp32 logits (B, V) of the token after each row."""
    prefix = None
    if model.config.attn_config.prefix_lm:
        # The prompt sees itself both ways, a generated token all before it: what a cache would give.
        prefix = torch.zeros_like(mask)
        prefix[:, :prompt] = True
    out = model(ids, attention_mask=mask, prefix_mask=prefix, logits_to_keep=1, return_logits=True, return_dict=True)
    return out.logits[:, -1].float()


def _penalised(scores: Tensor, ids: Tensor, mask: Tensor, penalty: float) -> Tensor:
    if penalty == 1:
        return scores
    seen = torch.zeros_like(scores, dtype=torch.bool)
    rows, columns = mask.nonzero(as_tuple=True)
    seen[rows, ids[rows, columns]] = True
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _sample(scores: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> Tensor:
    scores = scores / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what precedes it reaches top_p already; never the first
        scores = scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _holds_stop(new: Tensor, finished: Tensor, stops: list[str], tokenizer: TextDecoder) -> Tensor:
    """Which rows' new text holds a stop string; finished rows are not decoded again."""
    done = finished.tolist()
    found = [
        not old and any(s in tokenizer.decode(row) for s in stops) for row, old in zip(new.tolist(), done, strict=True)
    ]
    return torch.tensor(found, device=new.device)
