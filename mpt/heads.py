"""What stands on top of MptModel: the language-model head, its loss, and generation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from mpt import generate as generation
from mpt.config import MptConfig
from mpt.context import ContextSplit
from mpt.model import MptModel, MptPreTrainedModel, building_device
from mpt.outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions


class MptForCausalLM(MptPreTrainedModel):
    """MptModel with logits over the vocabulary, a loss, and `generate`.

    With tie_word_embeddings the head's weight is wte, and `lm_head` is None: there is no second name for it. Loading a
    state dict that has a redundant `lm_head.weight` drops it; one that differs from wte is an error.
    """

    def __init__(self, config: MptConfig) -> None:
        super().__init__(config)
        device = building_device(config)
        with torch.device("meta"):
            self.transformer = MptModel(config)
            self.lm_head = (
                None if config.tie_word_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
            )
        self.register_load_state_dict_pre_hook(_drop_redundant_head)
        self._materialize(device)

    def get_output_embeddings(self) -> nn.Module:
        """The module whose weight (V, d) makes the logits: lm_head, or wte where they are tied."""
        return self.transformer.wte if self.lm_head is None else self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        sequence_id: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        context: ContextSplit | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Loss and logits; the arguments of MptModel.forward, and:

        labels: (B, S) int, shifted here: position i is trained on labels[:, i + 1], and -100 does not count. The loss
            is the mean over the labels that count (0 where none does); it never forms the logits.
        num_items_in_batch: the loss is then the sum over the labels that count, divided by this.
        logits_to_keep: n > 0 gives logits for the last n positions, a 1-D tensor for those positions, 0 for all.
        return_logits: None means yes, unless the model trains with labels; then logits is None, with no place in the
            tuple.
        context: as for MptModel; labels are whole. The loss is this rank's share: those of the group add up to the
            loss of the whole sequences.
        """
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_position=cache_position,
            sequence_id=sequence_id,
            token_type_ids=token_type_ids,
            prefix_mask=prefix_mask,
            context=context,
        )
        assert isinstance(outputs, BaseModelOutputWithPastAndCrossAttentions)
        hidden = outputs.last_hidden_state
        assert hidden is not None
        loss = None if labels is None else self._loss(hidden, labels, num_items_in_batch, context)
        if return_logits is None:
            return_logits = not (self.training and labels is not None)
        out = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=self._logits(hidden, logits_to_keep) if return_logits else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    generate = generation.generate

    def _head_weight(self) -> Tensor:
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def _loss(
        self, hidden: Tensor, labels: Tensor, num_items: int | Tensor | None, context: ContextSplit | None
    ) -> Tensor:
        shape = (hidden.shape[0], hidden.shape[1] if context is None else context.length)
        if labels.shape != shape:
            raise ValueError(f"labels are {tuple(labels.shape)}; they must be (B, S) = {shape}")
        # Shift the labels, which are small, instead of the hidden states: those stay one contiguous block.
        shifted = torch.cat((labels[:, 1:], labels.new_full((labels.shape[0], 1), -100)), dim=1)
        if context is not None:
            num_items = (shifted != -100).sum().clamp(min=1) if num_items is None else num_items
            shifted = context.take(shifted)
        reduction = "mean" if num_items is None else "sum"
        factor = self.config.logit_factor
        loss = kernels.linear_cross_entropy(
            hidden, self._head_weight(), shifted, logit_scale=factor, reduction=reduction
        )
        return loss if num_items is None else loss / num_items

    def _logits(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        if isinstance(keep, Tensor):
            hidden = hidden[:, keep]
        elif keep:
            hidden = hidden[:, -keep:]
        logits = F.linear(hidden, self._head_weight())
        return logits if self.config.logit_scale is None else logits * self.config.logit_factor


def _drop_redundant_head(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before a state dict is loaded into a tied model: its lm_head.weight must be its wte.weight, and is dropped."""
    assert isinstance(module, MptForCausalLM)
    if module.lm_head is None and (head := state.get(f"{prefix}lm_head.weight")) is not None:
        wte = state.get(f"{prefix}transformer.wte.weight")
        if wte is None or not torch.equal(head, wte):
            raise ValueError(
                f"{prefix}lm_head.weight differs from wte.weight; set tie_word_embeddings to False to keep both"
            )
        del state[f"{prefix}lm_head.weight"]
