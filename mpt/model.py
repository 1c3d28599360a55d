"""MptModel: embeddings, pre-norm blocks of attention and MLP, the final norm. Wiring; the arithmetic is in kernels."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import kernels
from mpt import checkpoint
from mpt.config import MptConfig
from mpt.context import ContextSplit
from mpt.initialize import init_weights
from mpt.outputs import BaseModelOutputWithPastAndCrossAttentions

ActivationCheckpointing = Literal["none", "full", "selective"]


class AttentionRules:
    """What every block's attention takes besides x: ALiBi's slopes (H,), fp32, and who sees whom, each (B, S) or None.

    With a context, x is this rank's part of the sequences; the masks are whole.

    A class of its own, neither keywords nor a dataclass: fully_shard casts the floating tensors that it finds in those,
    among a block's arguments, to its own precision, and slopes in bf16 are wrong by up to 0.4 %.
    """

    def __init__(
        self,
        alibi_slopes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> None:
        self.alibi_slopes = alibi_slopes
        self.attention_mask = attention_mask
        self.sequence_id = sequence_id
        self.prefix_mask = prefix_mask
        self.context: ContextSplit | None = None


class MptNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension. forward(x) -> y; forward(x, residual) -> (y, x + residual).

    The low-precision forms work in autocast's dtype (statistics in fp32 all the same), the plain ones in fp32; without
    autocast both take what they are given. RMSNorm returns its input's dtype, LayerNorm the dtype it worked in.
    """

    def __init__(self, size: int, config: MptConfig) -> None:
        super().__init__()
        self.rms = "rms" in config.norm_type
        self.low_precision = config.norm_type.startswith("low_precision")
        self.eps = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.norm_bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._norm(x, self.weight, self.bias, residual)
        if self.low_precision:
            out = self._norm(x, self.weight, self.bias, residual)
        else:
            with torch.autocast(device, enabled=False):
                bias = None if self.bias is None else self.bias.float()
                wide = None if residual is None else residual.float()
                out = self._norm(x.float(), self.weight.float(), bias, wide)
        if not self.rms:
            return out
        return out.to(x.dtype) if residual is None else (out[0].to(out[1].dtype), out[1])

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
        if self.rms:
            return kernels.rms_norm(x, weight, eps=self.eps, residual=residual)
        return kernels.layer_norm(x, weight, bias, eps=self.eps, residual=residual)


class MptAttention(nn.Module):
    """Wqkv, clip, norm of q and k, attention with ALiBi, out_proj. forward(x (B, S, d), rules) -> (B, S, d).

    With output_attentions, also the probabilities (B, H, S, S), computed apart.
    """

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        attn, self.d_head = config.attn_config, config.d_head
        self.clip_qkv, self.softmax_scale, self.dropout_p = attn.clip_qkv, attn.softmax_scale, attn.attn_pdrop
        q, kv = config.d_model, config.kv_heads * config.d_head
        self.widths = [q, kv, kv]
        self.Wqkv = nn.Linear(config.d_model, q + 2 * kv, bias=not config.no_bias)
        self.q_ln = MptNorm(q, config) if attn.qk_ln else None
        self.k_ln = MptNorm(kv, config) if attn.qk_ln else None
        self.out_proj = nn.Linear(q, config.d_model, bias=not config.no_bias)

    def forward(self, x: Tensor, rules: AttentionRules, *, output_attentions: bool = False) -> Any:
        qkv = self.Wqkv(x)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = qkv.split(self.widths, dim=-1)
        if self.q_ln is not None and self.k_ln is not None:
            q, k = self.q_ln(q).to(q.dtype), self.k_ln(k).to(k.dtype)
        q, k, v = (t.unflatten(-1, (-1, self.d_head)) for t in (q, k, v))
        dropout_p = self.dropout_p if self.training else 0.0
        attend: Any = kernels.flash_attention if rules.context is None else rules.context.attention
        out = attend(
            q,
            k,
            v,
            alibi_slopes=rules.alibi_slopes,
            softmax_scale=self.softmax_scale,
            attention_mask=rules.attention_mask,
            sequence_id=rules.sequence_id,
            prefix_mask=rules.prefix_mask,
            dropout_p=dropout_p,
        )
        out = self.out_proj(out.flatten(2))
        return (out, attention_probabilities(q, k, rules, self.softmax_scale)) if output_attentions else out


class MptMLP(nn.Module):
    """down_proj(gelu(up_proj(x))), GELU exact."""

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ffn, bias=not config.no_bias)
        self.down_proj = nn.Linear(config.d_ffn, config.d_model, bias=not config.no_bias)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_proj, self.down_proj
        return kernels.mlp(x, up.weight, down.weight, up.bias, down.bias)


class MptBlock(nn.Module):
    """x += drop(attn(norm_1(x))); x += drop(ffn(norm_2(x))). forward(x (B, S, d), rules) -> x of the same dtype.

    With output_attentions, (x, probabilities). The unit that fully_shard and compile wrap.
    """

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.resid_pdrop = config.resid_pdrop
        self.norm_1 = MptNorm(config.d_model, config)
        self.attn = MptAttention(config)
        self.norm_2 = MptNorm(config.d_model, config)
        self.ffn = MptMLP(config)
        self.activation_checkpointing: ActivationCheckpointing = "none"

    def forward(self, x: Tensor, rules: AttentionRules, *, output_attentions: bool = False) -> Any:
        if self.activation_checkpointing == "none" or not (self.training and torch.is_grad_enabled()):
            return self._forward(x, rules, output_attentions)
        # Inside the block, so that what wraps it (fully_shard, compile) does not see a second forward.
        if self.activation_checkpointing == "selective":
            return activation_checkpoint(
                self._forward, x, rules, output_attentions, use_reentrant=False, context_fn=_keep_attention
            )
        return activation_checkpoint(self._forward, x, rules, output_attentions, use_reentrant=False)

    def _forward(self, x: Tensor, rules: AttentionRules, output_attentions: bool) -> Any:
        h = self.attn(self.norm_1(x), rules, output_attentions=output_attentions)
        h, probabilities = h if output_attentions else (h, None)
        h, x = self.norm_2(self._drop(h), residual=x)
        x = x + self._drop(self.ffn(h))
        return (x, probabilities) if output_attentions else x

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.resid_pdrop) if self.training and self.resid_pdrop else x


def _keep_attention() -> Any:
    """For `selective`: keep attention's outputs, the dearest to compute again, and recompute the rest."""
    return create_selective_checkpoint_contexts([torch.ops.mpt.flash_attention.default])


class MptPreTrainedModel(nn.Module):
    """What MptModel and the models with heads share: a checked configuration, where they are built, saving, loading."""

    config: MptConfig

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        config.check()
        self.config = config

    def _materialize(self, device: torch.device) -> None:
        """Move what was built on meta to `device`, and initialise it there from a seed that torch's generator gives."""
        if device.type != "meta":
            self.to_empty(device=device)
            init_weights(self, int(torch.randint(2**62, (), device="cpu")))

    def num_parameters(self) -> int:
        """The number of parameters; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())

    def get_input_embeddings(self) -> nn.Embedding:
        """wte, weight (V, d)."""
        wte = getattr(self, "transformer", self).wte
        assert isinstance(wte, nn.Embedding)
        return wte

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int | str = "5GB", dtype: torch.dtype | None = None
    ) -> None:
        """Write a folder that `from_pretrained` and transformers read: safetensors (in shards), and config.json.

        dtype: of the saved weights; None keeps each as it is. Replaces an older save in `folder`; see
        mpt.checkpoint.save_hf.
        """
        checkpoint.save_hf(self.named_parameters(), self.config, folder, max_shard_size=max_shard_size, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """A model in eval mode from a Hugging Face folder; `init_device` plays no part.

        dtype: of the parameters; None takes the checkpoint's. Errors as mpt.checkpoint.load_hf.
        """
        with torch.device("meta"):
            model = cls(MptConfig.from_pretrained(folder))
        model = model.to(dtype or checkpoint.dtype_of(folder)).to_empty(device=device)
        checkpoint.load_hf(model, folder)
        return model.eval()


class MptModel(MptPreTrainedModel):
    """The blocks between token ids and the last hidden states; no head."""

    def __init__(self, config: MptConfig) -> None:
        super().__init__(config)
        device = building_device(config)
        if not (config.learned_positions or config.attn_config.alibi):
            warnings.warn(
                "attn_config.alibi and learned_pos_emb are both False: the model has no notion of positions",
                stacklevel=2,
            )
        with torch.device("meta"):
            self.wte = nn.Embedding(config.vocab_size, config.d_model)
            self.wpe = nn.Embedding(config.max_seq_len, config.d_model) if config.learned_positions else None
            self.blocks = nn.ModuleList(MptBlock(config) for _ in range(config.n_layers))
            self.norm_f = MptNorm(config.d_model, config)
        self._slopes: dict[torch.device, Tensor] = {}  # ALiBi's slopes by device: no buffer, so no key in a checkpoint
        self._materialize(device)

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """What the blocks keep for the backward in train mode: "none" recomputes nothing, "full" keeps a block's input
        only, "selective" its attention outputs as well, which are the dearest to compute again.
        """
        for block in self.blocks:
            assert isinstance(block, MptBlock)
            block.activation_checkpointing = mode

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        sequence_id: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        context: ContextSplit | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """Hidden states (B, S, d) of input_ids (B, S) int, or of inputs_embeds (B, S, d) in their place.

        attention_mask: (B, S), 1 or True where a token is real. Left and right padding both work; outputs at padding
            are unspecified but finite.
        sequence_id: (B, S) int, also called token_type_ids. With attn_uses_sequence_id tokens see their own sequence
            only, and -1 is padding; required in train mode.
        prefix_mask: (B, S), True at keys that every query sees; required with prefix_lm.
        output_attentions: also the probabilities (B, H, S, S) of each block, computed apart from the fast path.
        output_hidden_states: also what enters each block, (B, S, d). None for these and return_dict means the
            configuration's value.
        context: share each sequence with other ranks. All arguments are whole, the outputs are this rank's part: the
            positions that `context.take` gives. It has to be made from the attention_mask and sequence_id given here.
            Not with prefix_mask or output_attentions.
        use_cache, past_key_values, cache_position: there is no cache in this version; asking for one is an error.

        ValueError names the argument that does not fit.
        """
        config = self.config
        if use_cache or past_key_values is not None or cache_position is not None:
            raise ValueError(
                "use_cache, past_key_values and cache_position need a key/value cache, which this version does not have"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        if given.dim() != (2 if input_ids is not None else 3):
            raise ValueError(f"input_ids must be (B, S) and inputs_embeds (B, S, d), not {tuple(given.shape)}")
        if token_type_ids is not None:
            if sequence_id is not None:
                raise ValueError("sequence_id and token_type_ids are two names of one argument: give one of them")
            sequence_id = token_type_ids
        rules = self._rules(given, attention_mask, sequence_id, prefix_mask)
        if context is not None:
            _check_context(context, given, rules, output_attentions)
            rules.context = context
        x = self._embed(input_ids, inputs_embeds, rules)

        hidden: list[Tensor] = []
        attentions: list[Tensor] = []
        for block in self.blocks:
            if output_hidden_states:
                hidden.append(x)
            if output_attentions:
                x, probabilities = block(x, rules, output_attentions=True)
                attentions.append(probabilities)
            else:
                x = block(x, rules)
        x = self.norm_f(x)
        out = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return out if (config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _rules(
        self, given: Tensor, attention_mask: Tensor | None, sequence_id: Tensor | None, prefix_mask: Tensor | None
    ) -> AttentionRules:
        """The arguments checked and brought to one form. Nothing here waits for a GPU."""
        attn, shape = self.config.attn_config, given.shape[:2]
        for name, mask in (
            ("attention_mask", attention_mask),
            ("sequence_id", sequence_id),
            ("prefix_mask", prefix_mask),
        ):
            if mask is not None and mask.shape != shape:
                raise ValueError(f"{name} is {tuple(mask.shape)}; it must be (B, S) = {tuple(shape)}")
        if attn.prefix_lm != (prefix_mask is not None):
            wanted = "needs" if attn.prefix_lm else "takes no"
            raise ValueError(f"with attn_config.prefix_lm {attn.prefix_lm} the model {wanted} prefix_mask")
        if sequence_id is not None and not attn.attn_uses_sequence_id:
            warnings.warn(
                "sequence_id is given but attn_config.attn_uses_sequence_id is False: it has no effect", stacklevel=4
            )
            sequence_id = None
        if sequence_id is None and attn.attn_uses_sequence_id and self.training:
            raise ValueError("attn_config.attn_uses_sequence_id is True: training needs sequence_id (B, S)")
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            if _readable(attention_mask) and attention_mask.all():
                attention_mask = None  # no padding: the attention has less to do
        if sequence_id is not None and self.wpe is not None:
            # Attention needs no mask for ids of -1, since no real token shares that id; positions do.
            real = sequence_id >= 0
            attention_mask = real if attention_mask is None else attention_mask & real
        slopes = self._alibi_slopes(given.device) if attn.alibi else None
        return AttentionRules(slopes, attention_mask, sequence_id, None if prefix_mask is None else prefix_mask.bool())

    def _alibi_slopes(self, device: torch.device) -> Tensor:
        if device not in self._slopes:
            slopes = kernels.alibi_slopes(self.config.n_heads, self.config.attn_config.alibi_bias_max)
            self._slopes[device] = slopes.to(device)
        return self._slopes[device]

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, rules: AttentionRules) -> Tensor:
        context, positions = rules.context, None
        if self.wpe is not None:
            positions = self._positions(input_ids if inputs_embeds is None else inputs_embeds, rules.attention_mask)
        if context is not None:
            input_ids, inputs_embeds = (None if x is None else context.take(x) for x in (input_ids, inputs_embeds))
            positions = None if positions is None else context.take(positions, dim=-1)
        if inputs_embeds is not None:
            x = inputs_embeds
        else:
            assert input_ids is not None
            try:
                x = self.wte(input_ids)
            except IndexError:  # on a CPU; a GPU's own assertion says so without making anyone wait
                low, high = int(input_ids.min()), int(input_ids.max())
                worst, last = low if low < 0 else high, self.config.vocab_size - 1
                raise ValueError(f"input_ids hold {worst}; ids must be in 0..{last} (vocab_size - 1)") from None
        if self.wpe is not None:
            x = x + self.wpe(positions)
        if (f := self.config.embedding_fraction) != 1:
            x = f * x + (1 - f) * x.detach()
        return F.dropout(x, self.config.emb_pdrop) if self.training and self.config.emb_pdrop else x

    def _positions(self, x: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """(S,) or (B, S): a token's place among the real tokens of its row, for ids (B, S) or embeddings (B, S, d)."""
        assert x is not None
        length, limit = x.shape[1], self.config.max_seq_len
        positions = torch.arange(length, device=x.device)
        if attention_mask is not None:
            positions = (positions - (~attention_mask).cumsum(1)).clamp(min=0)
        if length > limit and (attention_mask is None or (longest := int(positions.max()) + 1) > limit):
            got = length if attention_mask is None else longest
            raise ValueError(
                f"a sequence has {got} positions and max_seq_len is {limit}; learned positions go no further"
            )
        return positions


def _check_context(context: ContextSplit, given: Tensor, rules: AttentionRules, output_attentions: bool | None) -> None:
    if given.shape[1] != context.length:
        raise ValueError(f"the sequences have {given.shape[1]} tokens and context was made for {context.length}")
    if context.documents and rules.sequence_id is None:
        raise ValueError("context was made from sequence_id, which this model's attention does not use: leave it out")
    if output_attentions:
        raise ValueError("output_attentions does not work where ranks share sequences (context); leave it out")


def building_device(config: MptConfig) -> torch.device:
    """Where a model is built: the device of a `with torch.device(...)` around it, else as `init_device` says."""
    around = torch.get_default_device()
    if around.type != "cpu" or config.init_device == "cpu":
        return around
    if config.init_device == "mixed":
        return torch.device("cpu" if int(os.environ.get("LOCAL_RANK", "0")) == 0 else "meta")
    return torch.device(config.init_device)


def attention_probabilities(q: Tensor, k: Tensor, rules: AttentionRules, softmax_scale: float | None) -> Tensor:
    """softmax(scale*q.k - slope*|i - j|) over visible keys, in fp32, cast to q's dtype: (B, H, S, S) from q (B, S, H,
    D), k (B, S, G, D).

    Before dropout. A query that sees no key has zeros.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bshd,bthd->bhst", q.to(wide), k.to(wide)) * scale
    place = torch.arange(q.shape[1], device=q.device)
    if rules.alibi_slopes is not None:
        scores = scores - rules.alibi_slopes[:, None, None] * (place[:, None] - place).abs()
    visible = (place[:, None] >= place)[None, None]
    if rules.prefix_mask is not None:
        visible = visible | rules.prefix_mask[:, None, None, :]
    if rules.attention_mask is not None:
        visible = visible & rules.attention_mask[:, None, None, :]
    if (ids := rules.sequence_id) is not None:
        visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0).to(q.dtype)


def _readable(mask: Tensor) -> bool:
    """Whether its values can be looked at here for nothing: on a CPU, outside tracing."""
    return type(mask) is Tensor and mask.device.type == "cpu" and not torch.compiler.is_compiling()
