"""Answers of a fine-tuned model to a few fixed prompts, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpt import MptForCausalLM
from trainer.data.config import DatasetConfig
from trainer.data.examples import Encoder
from trainer.data.finetune import ExampleBatches
from trainer.data.templates import IM_END, Template

HELD_OUT = 3  # examples asked where no prompts are configured


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it. reference: the data set's own response; None where there is none."""

    ids: tuple[int, ...]
    text: str
    reference: str | None


def questions(
    dataset: DatasetConfig, instructions: Sequence[str], encoder: Encoder, held_out: ExampleBatches
) -> list[Question]:
    """The instructions in the data set's template, or the first examples of `held_out` where there are none."""
    if not instructions:
        pairs = [held_out.sample_prompt(i) for i in range(min(HELD_OUT, len(held_out.examples)))]
        return [
            Question(tuple(prompt), encoder.decode(prompt), _spoken(encoder, response))
            for prompt, response in ((p.tolist(), r.tolist()) for p, r in pairs)
        ]
    template = Template(dataset.template, dataset.fields, dataset.system_prompt)
    segments = [template.prompt(text, held_out.examples.form) for text in instructions]
    ids = [tuple(i for part in parts for i in part) for parts in encoder.encode(segments)]
    return [Question(q, "".join(s.text for s in rendered), None) for q, rendered in zip(ids, segments)]


def answer(model: MptForCausalLM, asked: Sequence[Question], encoder: Encoder, tokens: int) -> list[str]:
    """The likeliest answer to each, up to an end token or `tokens`. Collective: a sharded forward needs every rank."""
    prompts = [q.ids or (encoder.eos_id,) for q in asked]
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), encoder.eos_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    if model.config.learned_positions:
        tokens = min(tokens, model.config.max_seq_len - longest + 1)
    ends = _ends(encoder)
    device = next(model.parameters()).device
    out = model.generate(ids.to(device), mask.to(device), max_new_tokens=tokens, eos_token_id=ends)
    return [_spoken(encoder, row) for row in out[:, longest:].tolist()]


def line(question: Question, text: str) -> str:
    """A question and its answer for the log."""
    return f"prompt: {question.text}\nanswer: {text}"


def markdown(run_name: str, step: int, asked: Sequence[Question], answers: Sequence[str]) -> str:
    """Questions and answers as a Markdown page."""
    parts = [f"# {run_name} after step {step}", "The likeliest answers, token by token."]
    for number, (question, text) in enumerate(zip(asked, answers), start=1):
        parts += [f"## Prompt {number}", _block(question.text), "Answer:", _block(text)]
        if question.reference is not None:
            parts += ["The data's own response:", _block(question.reference)]
    return "\n\n".join(parts) + "\n"


def _ends(encoder: Encoder) -> list[int]:
    """The tokens that end a response."""
    marker = encoder.marker_id(IM_END)
    return [encoder.eos_id] if marker is None else [encoder.eos_id, marker]


def _spoken(encoder: Encoder, row: list[int]) -> str:
    """The text of a response up to its end, which is text itself where the tokenizer has no token for it."""
    ends = _ends(encoder)
    until = next((i for i, token in enumerate(row) if token in ends), len(row))
    return encoder.decode(row[:until]).split(IM_END.text)[0]


def _block(text: str) -> str:
    """Indented, so that no text can end the block."""
    return "\n".join("    " + part for part in text.splitlines()) or "    (nothing)"
