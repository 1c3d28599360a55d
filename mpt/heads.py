"""What stands on top of MptModel: a language-model head with its loss and generation, and three classifiers."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from mpt import generate as generation
from mpt.config import MptConfig
from mpt.context import ContextSplit
from mpt.losses import sequence_loss, span_loss, token_loss
from mpt.model import MptModel, MptPreTrainedModel, building_device, linear, readable, refuse_unknown
from mpt.outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)


class MptForCausalLM(MptPreTrainedModel):
    """MptModel with logits (B, S, V) over the vocabulary, a loss, and `generate`.

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

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another nn.Linear, weight (V, d), in lm_head's place; where they are tied, an nn.Embedding in wte's.
        ValueError for another shape, or a bias, which lm_head never has.
        """
        if self.lm_head is None:
            self.set_input_embeddings(new_embeddings)  # type: ignore[arg-type]
            return
        expected = tuple(self.lm_head.weight.shape)
        if not isinstance(new_embeddings, nn.Linear) or new_embeddings.weight.shape != expected:
            found = getattr(new_embeddings, "weight", new_embeddings)
            raise ValueError(
                f"new_embeddings are a {type(new_embeddings).__name__} {tuple(getattr(found, 'shape', ()))}; pass an "
                f"nn.Linear with weight (vocab_size, d_model) = {expected}; resize_token_embeddings changes vocab_size"
            )
        if new_embeddings.bias is not None:
            raise ValueError("new_embeddings have a bias, which lm_head never has; pass nn.Linear(..., bias=False)")
        self.lm_head = new_embeddings

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
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Loss, and logits (B, S, V) of input_ids (B, S); the arguments of MptModel.forward, and:

        labels: (B, S) int, shifted here: position i is trained on labels[:, i + 1], and -100 does not count. The loss
            is the mean over the labels that count (0 where none does); it never forms the logits.
        num_items_in_batch: the loss is then the sum over the labels that count, divided by this.
        logits_to_keep: n > 0 gives logits for the last n positions, a 1-D tensor for those positions, 0 for all.
        return_logits: None means yes, unless the model trains with labels; then logits is None, with no place in the
            tuple.
        context: as for MptModel; labels are whole. The loss is this rank's share: those of the group add up to the
            loss of the whole sequences.

        ValueError names the argument that does not fit; IndexError a label outside the vocabulary.
        """
        refuse_unknown(MptForCausalLM.forward, kwargs)
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
            past_key_values=outputs.past_key_values,
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
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels are {what}; they must be a tensor of integers, ids or -100")
        if labels.shape != shape:
            raise ValueError(f"labels are {tuple(labels.shape)}; they must be (B, S) = {shape}")
        shifted = shift_labels(labels.long())
        if context is not None:
            num_items = (shifted != -100).sum() if num_items is None else num_items
            shifted = context.take(shifted)
        reduction = "mean" if num_items is None else "sum"
        factor = self.config.logit_factor
        loss = kernels.linear_cross_entropy(
            hidden, self._head_weight(), shifted, logit_scale=factor, reduction=reduction
        )
        # Where nothing counts, the loss is 0, not NaN.
        return loss if num_items is None else loss / (num_items + (num_items == 0))

    def _logits(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        if isinstance(keep, Tensor):
            hidden = hidden[:, keep]
        elif keep:
            hidden = hidden[:, -keep:]
        logits = linear(hidden, self._head_weight())
        return logits if self.config.logit_scale is None else logits * self.config.logit_factor


def shift_labels(labels: Tensor) -> Tensor:
    """What each position is trained on, (B, S): the next label, -100 at the end. Labels are small; hidden states, not
    shifted, stay one contiguous block.
    """
    return torch.cat((labels[:, 1:], labels.new_full((labels.shape[0], 1), -100)), dim=1)


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


class _Classifier(MptPreTrainedModel):
    """What the classifiers share: MptModel, and on top of it one layer, `head`, by the name that checkpoints have."""

    # transformers' Trainer then does not pass num_items_in_batch, as to its own MPT classifiers.
    accepts_loss_kwargs = False

    def __init__(self, config: MptConfig, head: str, size: int, *, bias: bool) -> None:
        super().__init__(config)
        device = building_device(config)
        with torch.device("meta"):
            self.transformer = MptModel(config)
            self.add_module(head, nn.Linear(config.d_model, size, bias=bias))
        self._materialize(device)

    @property
    def num_labels(self) -> int:
        """config.num_labels."""
        return self.config.num_labels

    def _body(self, **inputs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        outputs = self.transformer(**inputs, return_dict=True)
        assert isinstance(outputs, BaseModelOutputWithPastAndCrossAttentions)
        return outputs

    def _returned(self, out: ModelOutput, return_dict: bool | None) -> Any:
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


class MptForSequenceClassification(_Classifier):
    """MptModel with num_labels scores (or numbers, in regression) for each sequence, read at its last token.

    The last token is the last that is not config.pad_token_id; without pad_token_id, or with inputs_embeds, it is the
    last position. `score` (num_labels, d) has no bias.
    """

    score: nn.Linear

    def __init__(self, config: MptConfig) -> None:
        super().__init__(config, "score", config.num_labels, bias=False)

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
        *,
        sequence_id: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Loss, and logits (B, num_labels) of input_ids (B, S); the arguments of MptModel.forward, and:

        labels: config.problem_type says what they are; where it is None, num_labels 1 means regression, whole numbers
            single label, others multi label. Regression: (B, num_labels), or (B,) for num_labels 1; the loss is the
            mean square error. Single label: (B,) int, 0 to num_labels - 1, cross-entropy; -100 does not count. Multi
            label: (B, num_labels), 0 to 1, binary cross-entropy.

        ValueError names the argument that does not fit.
        """
        refuse_unknown(MptForSequenceClassification.forward, kwargs)
        outputs = self._body(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            sequence_id=sequence_id,
            token_type_ids=token_type_ids,
            prefix_mask=prefix_mask,
        )
        hidden = outputs.last_hidden_state
        assert hidden is not None
        last = self._last_tokens(hidden, input_ids, attention_mask)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        out = SequenceClassifierOutputWithPast(
            loss=None if labels is None else sequence_loss(logits, labels, self.config),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self._returned(out, return_dict)

    def _last_tokens(self, hidden: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """(B,): the position of each row's last token."""
        rows, length = hidden.shape[:2]
        pad = self.config.pad_token_id
        if input_ids is not None and pad is not None:
            return (torch.arange(length, device=input_ids.device) * (input_ids != pad)).amax(1)
        if attention_mask is not None and readable(attention_mask) and not attention_mask[:, -1].all():
            reason = "config.pad_token_id is None" if pad is None else "inputs_embeds do not show where padding is"
            warnings.warn(f"{reason}: the last position is classified, which is padding in some rows", stacklevel=4)
        return torch.full((rows,), length - 1, device=hidden.device)


class MptForTokenClassification(_Classifier):
    """MptModel with num_labels scores (or one number, in regression) for each token.

    Dropout of config.classifier_dropout, else hidden_dropout, else 0.1, stands before `classifier` (num_labels, d),
    which has a bias.
    """

    classifier: nn.Linear

    def __init__(self, config: MptConfig) -> None:
        super().__init__(config, "classifier", config.num_labels, bias=True)
        given = (config.classifier_dropout, config.hidden_dropout, 0.1)
        self.dropout = nn.Dropout(next(p for p in given if p is not None))

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
        *,
        sequence_id: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Loss, and logits (B, S, num_labels) of input_ids (B, S); the arguments of MptModel.forward, and:

        labels: (B, S) int, 0 to num_labels - 1, cross-entropy; for num_labels 1 numbers, mean square error. -100 does
            not count in either, and is what padding should have.

        A cache is used where one is given, but is no part of the output. ValueError names the argument that does not
        fit.
        """
        refuse_unknown(MptForTokenClassification.forward, kwargs)
        outputs = self._body(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            sequence_id=sequence_id,
            token_type_ids=token_type_ids,
            prefix_mask=prefix_mask,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        out = TokenClassifierOutput(
            loss=None if labels is None else token_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self._returned(out, return_dict)


class MptForQuestionAnswering(_Classifier):
    """MptModel with two scores for each token: that the answer starts there, and that it ends there.

    `qa_outputs` (2, d) has a bias.
    """

    qa_outputs: nn.Linear

    def __init__(self, config: MptConfig) -> None:
        super().__init__(config, "qa_outputs", 2, bias=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        sequence_id: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Loss, and start_logits and end_logits (B, S) of input_ids (B, S); MptModel.forward's arguments but the
        cache's, and:

        start_positions, end_positions: (B,) or (B, 1) int, the answer's first and last token, clamped to 0..S; S, past
            the sequence, does not count. The loss is the mean of the two cross-entropies over all S positions.

        ValueError names the argument that does not fit.
        """
        refuse_unknown(MptForQuestionAnswering.forward, kwargs)
        if (start_positions is None) != (end_positions is None):
            given, absent = ("start", "end") if end_positions is None else ("end", "start")
            raise ValueError(f"{given}_positions are given without {absent}_positions; the loss needs both")
        outputs = self._body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            sequence_id=sequence_id,
            token_type_ids=token_type_ids,
            prefix_mask=prefix_mask,
        )
        start, end = (t.contiguous() for t in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        out = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self._returned(out, return_dict)
