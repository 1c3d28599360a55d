"""From an example's fields to what a model reads: MPT's instruct prompt, ChatML, plain, a format string, or tokens."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from trainer.data.config import FieldsConfig

# MPT's instruct prompt, to the character: a released instruct model answers well to this one only.
INSTRUCT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "{instruction}\n"
    "\n"
    "### Response:\n"
)
TEMPLATES = ("instruct", "chatml", "plain")

RESPONSES = ("response", "completion", "output")
CONTEXTS = ("context", "input")
# What widespread data sets call the three roles.
ROLES = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "bing": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Marker:
    """A control token in a template, told apart from the same characters in a user's text."""

    text: str


IM_START, IM_END = Marker("<|im_start|>"), Marker("<|im_end|>")


@dataclass(frozen=True)
class Segment:
    """A run of an example that is tokenised by itself. trained: whether its tokens count in the loss. A part that is a
    number is a token already.
    """

    parts: tuple[str | Marker | int, ...]
    trained: bool

    @property
    def text(self) -> str:
        """The texts and markers."""
        return "".join(p.text if isinstance(p, Marker) else p for p in self.parts if not isinstance(p, int))


class Template:
    """How the examples of a data set become segments, prompts and responses in turn.

    name: "instruct", "chatml", "plain" (the prompt as it is), or a format string with an example's fields in braces;
        None chooses by the example: chatml for messages, instruct for an instruction, plain for a prompt.
    system_prompt: what a ChatML conversation without a system message begins with; None: nothing.

    context: the field that is configured to hold one.

    ValueError for a name or a format string that cannot be used, and a system prompt that would not be.
    """

    def __init__(self, name: str | None, fields: FieldsConfig, system_prompt: str | None = None) -> None:
        if system_prompt is not None and name not in (None, "chatml"):
            raise ValueError(f"system_prompt is for the template chatml, this one is {name!r}; leave one of them out")
        self._name, self._fields, self._system, self.context = name, fields, system_prompt, fields.context
        self._placeholders = () if name is None or name in TEMPLATES else _placeholders(name)
        self._roles = ROLES | fields.roles
        for theirs, ours in fields.roles.items():
            if ours not in ("system", "user", "assistant"):
                raise ValueError(f"fields.roles.{theirs}={ours!r}; expected system, user or assistant")

    def segments(self, row: Mapping[str, Any]) -> list[Segment]:
        """An example's segments; the last is trained. ValueError says what is missing or wrong in it."""
        form = self.form(row)
        if form == "messages":
            return self._conversation(row)
        response = Segment((_response(row, self._fields),), True)
        if self._placeholders:
            assert self._name is not None
            return [Segment((self._name.format_map(self._values(row)),), False), response]
        return [*self._prompt(self._request(row, form), form), Segment((*response.parts, *self._ending(form)), True)]

    def prompt(self, instruction: str, form: str) -> list[Segment]:
        """The segments before the response to an instruction, as in examples of that form. Other fields are empty."""
        if self._placeholders:
            assert self._name is not None
            values = dict.fromkeys(self._placeholders, "")
            asked = [name for name in values if name in ("instruction", "prompt")] or [self._placeholders[0]]
            return [Segment((self._name.format_map(values | dict.fromkeys(asked, instruction)),), False)]
        return self._prompt(instruction, form)

    def form(self, row: Mapping[str, Any]) -> str:
        """Which kind of example: "messages", "instruction", "prompt", or "fields" of a format string."""
        if self._placeholders:
            return "fields"
        known = ("messages", "instruction", "prompt")
        for form in known:
            if row.get(getattr(self._fields, form)) is not None:
                return form
        wanted = ", ".join(repr(getattr(self._fields, form)) for form in known)
        raise ValueError(f"none of the fields {wanted}; it has {_names(row)}: name them under dataset.fields")

    def _kind(self, form: str) -> str:
        """The template for examples of a form."""
        return self._name or {"messages": "chatml", "instruction": "instruct"}.get(form, "plain")

    def _request(self, row: Mapping[str, Any], form: str) -> str:
        text = _text(row, getattr(self._fields, form))
        context = _first(row, self._fields.context, CONTEXTS) if form == "instruction" else None
        more = "" if context is None else _text(row, context)
        return f"{text}\n{more}" if more else text

    def _prompt(self, request: str, form: str) -> list[Segment]:
        kind = self._kind(form)
        if kind == "chatml":
            return [Segment((*self._opening([]), *message("user", request), *header("assistant")), False)]
        return [Segment((INSTRUCT.format(instruction=request) if kind == "instruct" else request,), False)]

    def _ending(self, form: str) -> tuple[Marker, ...]:
        return (IM_END,) if self._kind(form) == "chatml" else ()

    def _values(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The placeholders' texts; our names stand for the fields that they are mapped to."""
        mapped = {name: getattr(self._fields, name) for name in ("prompt", "instruction")}
        mapped["context"] = _first(row, self._fields.context, CONTEXTS) or "context"
        fields = {name: name if name in row else mapped.get(name, name) for name in self._placeholders}
        for name, field in fields.items():
            if field not in row:
                raise ValueError(f"the template needs the field {name!r}; it has {_names(row)}")
        return {name: _text(row, field) for name, field in fields.items()}

    def _conversation(self, row: Mapping[str, Any]) -> list[Segment]:
        if self._name not in (None, "chatml"):
            raise ValueError(f"a conversation, which the template {self._name} cannot show; use chatml")
        turns = self._turns(row[self._fields.messages])
        out: list[Segment] = []
        pending: list[str | Marker] = [*self._opening(turns)]
        for number, (role, content) in enumerate(turns):
            if role != "assistant":
                pending += message(role, content)
                continue
            out += [Segment((*pending, *header(role)), False), Segment((content, IM_END), True)]
            pending = ["\n"] if number < len(turns) - 1 else []
        return out

    def _opening(self, turns: Sequence[tuple[str, str]]) -> tuple[str | Marker, ...]:
        given = bool(turns) and turns[0][0] == "system"
        return () if given or self._system is None else message("system", self._system)

    def _turns(self, messages: Any) -> list[tuple[str, str]]:
        """(role, content) of each message: perhaps a system's, then user and assistant in turn, an assistant's last."""
        fields = self._fields
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ValueError(f"field {fields.messages!r} is no list of messages, or an empty one")
        turns: list[tuple[str, str]] = []
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, Mapping):
                raise ValueError(f"message {number} is {type(message).__name__}, expected role and content")
            try:
                theirs, content = _text(message, fields.role), _text(message, fields.content)
            except ValueError as error:
                raise ValueError(f"message {number}: {error}") from None
            role = self._roles.get(theirs)
            if role is None:
                raise ValueError(
                    f"message {number}: role {theirs!r} is unknown; known are {', '.join(self._roles)}: "
                    "say what it means under dataset.fields.roles"
                )
            before = turns[-1][0] if turns else None
            wanted = "assistant" if before == "user" else "user"
            if role != wanted and not (role == "system" and before is None):
                first = "user (or system)" if before is None else wanted
                raise ValueError(f"message {number} is of role {role}, expected {first}: roles have to alternate")
            if role == "assistant" and not content.strip():
                raise ValueError(f"message {number}: the assistant's response is empty")
            turns.append((role, content))
        if turns[-1][0] != "assistant":
            raise ValueError(f"the last message is of role {turns[-1][0]}, expected a response of the assistant")
        return turns


def token_examples(row: Mapping[str, Any]) -> list[list[Segment]]:
    """The examples of a row of tokens: `input_ids`, and for each its label, -100 or the same id.

    With `sequence_id` it holds several, numbered 0, 1, 2, ... without a gap, and padding of -1 at the end. ValueError
    says what does not fit.
    """
    ids = _integers(row, "input_ids")
    labels, numbers = _integers(row, "labels"), [0] * len(ids)
    if row.get("sequence_id") is not None:
        numbers = _integers(row, "sequence_id")
    if not ids or not len(ids) == len(labels) == len(numbers):
        raise ValueError(
            f"{len(ids)} input_ids, {len(labels)} labels and {len(numbers)} sequence ids; expected one of each a token"
        )
    for place, (token, label) in enumerate(zip(ids, labels)):
        if not 0 <= token < 2**31 or label not in (-100, token):
            raise ValueError(f"token {place} has id {token} and label {label}; labels are -100 or the id itself")
    while numbers and numbers[-1] == -1:
        numbers.pop()
    if not numbers:
        raise ValueError("it holds padding only")
    for place, (before, number) in enumerate(zip([-1, *numbers], numbers)):
        if number < 0 or number - before not in ((0, 1) if place else (1,)):
            raise ValueError(
                f"sequence_id[{place}] is {number}{f' after {before}' if place else ''}: sequence ids are 0, 1, 2, ... "
                "without a gap, and -1 for padding at the end"
            )
    examples: dict[int, list[Segment]] = {}
    kinds = [(number, label != -100) for number, label in zip(numbers, labels)]
    for (number, trained), run in groupby(range(len(numbers)), kinds.__getitem__):
        examples.setdefault(number, []).append(Segment(tuple(ids[i] for i in run), trained))
    # The first label of an example never does: its logits would come from the token before.
    counting = {number for before, number, label in zip(numbers, numbers[1:], labels[1:])
                if number == before and label != -100}  # fmt: skip
    for number in sorted(examples.keys() - counting):
        raise ValueError(f"no label counts in {f'its example {number}' if len(examples) > 1 else 'it'}")
    return list(examples.values())


def _integers(row: Mapping[str, Any], name: str) -> list[int]:
    value = row.get(name)
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"field {name!r} is no list of integers; it has {_names(row)}")
    return list(value)


def _placeholders(template: str) -> tuple[str, ...]:
    """The fields that a format string names, each once."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"template={template!r} is no format string ({error}); write braces of the text twice"
        ) from None
    names = [name for _, name, _, _ in parsed if name is not None]
    if not names:
        raise ValueError(
            f"template={template!r}; expected {', '.join(TEMPLATES)}, or a text with fields in braces, "
            "such as 'Question: {question}'"
        )
    for _, name, spec, conversion in parsed:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise ValueError(f"template={template!r}: {{{name}}} has to be a field's name alone")
    return tuple(dict.fromkeys(names))


def header(role: str) -> tuple[str | Marker, ...]:
    """What begins a ChatML message."""
    return (IM_START, f"{role}\n")


def message(role: str, content: str) -> tuple[str | Marker, ...]:
    """A whole ChatML message."""
    return (IM_START, f"{role}\n{content}", IM_END, "\n")


def _response(row: Mapping[str, Any], fields: FieldsConfig) -> str:
    name = _first(row, fields.response, RESPONSES)
    if name is None:
        wanted = fields.response or ", ".join(RESPONSES)
        raise ValueError(f"no response ({wanted}); it has {_names(row)}: name the field with dataset.fields.response")
    text = _text(row, name)
    if not text.strip():
        raise ValueError(f"field {name!r}, the response, is empty")
    return text


def _first(row: Mapping[str, Any], given: str | None, known: Sequence[str]) -> str | None:
    """The field that is configured, else the first known one, that the row has and is not null."""
    return next((name for name in ([given] if given else known) if row.get(name) is not None), None)


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"no field {name!r}; it has {_names(row)}")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {'null' if value is None else type(value).__name__}, expected text")
    return value


def _names(row: Mapping[str, Any]) -> str:
    names = ", ".join(f"{name} (null)" if row[name] is None else str(name) for name in list(row)[:8])
    return names + (", ..." if len(row) > 8 else "") if names else "no fields"
