"""What the models return: small records that read as attributes, by key, or as the tuple of what is there."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput:
    """A record whose None fields count as absent: `out.loss`, `out["loss"]`, `out[0]`, `out.to_tuple()`.

    Iterating gives keys, as a dict does.
    """

    def keys(self) -> list[str]:
        """Names of the fields that are there, in order."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def values(self) -> list[Any]:
        """Their values, in the same order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names with values."""
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are there."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


@dataclass
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """Of MptModel. last_hidden_state (B, S, d); past_key_values: the MptCache, if one was asked for; hidden_states: L+1
    of (B, S, d), the embeddings, each block's output but the last's, then norm_f's; attentions: L of (B, H, S, past +
    S). cross_attentions is None.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """Of MptForCausalLM. loss: fp32 scalar, if labels were given; logits (B, S or kept, V); the rest as MptModel's."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutputWithPast(ModelOutput):
    """Of MptForSequenceClassification. loss: fp32 scalar, if labels were given; logits (B, num_labels); the rest as
    MptModel's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """Of MptForTokenClassification. loss: fp32 scalar, if labels were given; logits (B, S, num_labels); the rest as
    MptModel's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Of MptForQuestionAnswering. loss: fp32 scalar, if positions were given; start_logits and end_logits (B, S); the
    rest as MptModel's.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def _register(cls: type) -> None:
    """FSDP finds the tensors of a module's output, to hook their gradients, through pytree: it must be able to look
    inside.
    """
    names = [f.name for f in fields(cls)]
    pytree.register_pytree_node(
        cls,
        lambda out: ([getattr(out, name) for name in names], None),
        lambda values, _: cls(*values),
        serialized_type_name=f"mpt.{cls.__name__}",
    )


for _output in ModelOutput.__subclasses__():
    _register(_output)
