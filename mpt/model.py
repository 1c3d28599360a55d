"""MptModel: embeddings, pre-norm blocks of attention and MLP, the final norm. Wiring; the arithmetic is in kernels."""

import copy
import difflib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import kernels
from kernels.flash_attention import int32_ids
from kernels.product import product
from mpt import checkpoint
from mpt.cache import CacheStep, LayerStep, MptCache
from mpt.config import MptConfig
from mpt.context import ContextSplit
from mpt.initialize import init_weights
from mpt.offload import HostOffload
from mpt.outputs import BaseModelOutputWithPastAndCrossAttentions

ActivationCheckpointing = Literal["none", "full", "selective"]

# Of transformers' from_pretrained: what to do instead here.
FOREIGN_ARGUMENTS = {
    "torch_dtype": "its name is dtype",
    "device_map": "pass device, such as 'cuda'",
    "trust_remote_code": "code from a checkpoint is never run; leave it out",
    "low_cpu_mem_usage": "loading never holds the weights twice; leave it out",
    "attn_implementation": "the kernels are chosen by device (MPT_KERNELS overrides); leave it out",
    "cache_dir": "set HF_HUB_CACHE",
    "token": "set HF_TOKEN",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "force_download": "the hub's files are compared by revision; leave it out",
    "subfolder": "give the path of the folder itself",
    "output_loading_info": "what does not fit is an error that lists it; leave it out",
    "quantization_config": "weights are floating; pass dtype=torch.bfloat16 for half the memory",
    "state_dict": "build the model of its configuration and call load_state_dict",
}
# What a forward is asked for elsewhere.
FOREIGN_INPUTS = {"position_ids": "positions follow from attention_mask; leave it out"}


class AttentionRules:
    """What every block's attention takes besides x: ALiBi's slopes (H,), fp32, and who sees whom, each (B, S) or None
    (with a cache (B, past + S), over keys).

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
        if device == "meta" or not torch.is_autocast_enabled(device):
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


class MptLinear(nn.Linear):
    """nn.Linear, by the fastest product there is where nothing is differentiated: generation reads weights that way."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) weight^T + bias; see MptLinear."""
    kind = x.device.type
    if torch.is_grad_enabled() or kind != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled(kind):
        return F.linear(x, weight, bias)
    if type(weight) is not nn.Parameter or weight.dtype != x.dtype:  # DTensor, a tensor subclass of someone's
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():  # the compiler chooses a product of its own, and cannot lower a call of this one
        return F.linear(x, weight, bias)
    out = product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return out if bias is None else out.add_(bias)


class MptAttention(nn.Module):
    """Wqkv, clip, norm of q and k, attention with ALiBi, out_proj. forward(x (B, S, d), rules) -> (B, S, d).

    With output_attentions, also the probabilities (B, H, S, S), computed apart. With past, this block's part of a
    cache: x follows what that holds, and is added to it.
    """

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        attn, self.d_head = config.attn_config, config.d_head
        self.clip_qkv, self.softmax_scale, self.dropout_p = attn.clip_qkv, attn.softmax_scale, attn.attn_pdrop
        q, kv = config.d_model, config.kv_heads * config.d_head
        self.widths = [q, kv, kv]
        self.Wqkv = MptLinear(config.d_model, q + 2 * kv, bias=not config.no_bias)
        self.q_ln = MptNorm(q, config) if attn.qk_ln else None
        self.k_ln = MptNorm(kv, config) if attn.qk_ln else None
        self.out_proj = MptLinear(q, config.d_model, bias=not config.no_bias)

    def forward(
        self, x: Tensor, rules: AttentionRules, *, output_attentions: bool = False, past: LayerStep | None = None
    ) -> Any:
        qkv = self.Wqkv(x)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = qkv.split(self.widths, dim=-1)
        if self.q_ln is not None and self.k_ln is not None:
            q, k = self.q_ln(q).to(q.dtype), self.k_ln(k).to(k.dtype)
        q, k, v = (t.unflatten(-1, (-1, self.d_head)) for t in (q, k, v))
        dropout_p = self.dropout_p if self.training else 0.0
        if past is not None:
            out: Any = past.attend(q, k, v, rules, self.softmax_scale, dropout_p)
        else:
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
        if not output_attentions:
            return out
        keys = k if past is None else past.keys()
        return out, attention_probabilities(q, keys, rules, self.softmax_scale)


class MptMLP(nn.Module):
    """down_proj(gelu(up_proj(x))), GELU exact. chunk_size: tokens at a time, for kernels.mlp; None: all at once.

    Fused, and in chunks, unless something else stands in a projection's place, such as an adapter around it, whose
    forward has to be called.
    """

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ffn, bias=not config.no_bias)
        self.down_proj = nn.Linear(config.d_ffn, config.d_model, bias=not config.no_bias)
        self.chunk_size: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_proj, self.down_proj
        if type(up) is not nn.Linear or type(down) is not nn.Linear:
            return down(F.gelu(up(x)))
        return kernels.mlp(x, up.weight, down.weight, up.bias, down.bias, chunk_size=self.chunk_size)


class MptBlock(nn.Module):
    """x += drop(attn(norm_1(x))); x += drop(ffn(norm_2(x))). forward(x (B, S, d), rules) -> x of the same dtype.

    With output_attentions, (x, probabilities). past: as the attention's. The unit that fully_shard and compile wrap.
    """

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.resid_pdrop = config.resid_pdrop
        self.norm_1 = MptNorm(config.d_model, config)
        self.attn = MptAttention(config)
        self.norm_2 = MptNorm(config.d_model, config)
        self.ffn = MptMLP(config)
        self.activation_checkpointing: ActivationCheckpointing = "none"

    def forward(
        self, x: Tensor, rules: AttentionRules, *, output_attentions: bool = False, past: LayerStep | None = None
    ) -> Any:
        if not self.recomputes():
            return self._forward(x, rules, output_attentions, past)
        # Inside the block, so that what wraps it (fully_shard, compile) does not see a second forward.
        if self.activation_checkpointing == "selective":
            return activation_checkpoint(
                self._forward, x, rules, output_attentions, use_reentrant=False, context_fn=_keep_attention
            )
        return activation_checkpoint(self._forward, x, rules, output_attentions, use_reentrant=False)

    def recomputes(self) -> bool:
        """Whether a forward now keeps little and runs again in the backward."""
        return self.activation_checkpointing != "none" and self.training and torch.is_grad_enabled()

    def _forward(self, x: Tensor, rules: AttentionRules, output_attentions: bool, past: LayerStep | None = None) -> Any:
        h = self.attn(self.norm_1(x), rules, output_attentions=output_attentions, past=past)
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
    """What MptModel and the models with heads share: a checked configuration, saving and loading, embeddings that can
    be replaced and resized, gradient checkpointing.
    """

    config: MptConfig
    config_class = MptConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        if not isinstance(config, MptConfig):
            raise TypeError(
                f"config is a {type(config).__module__}.{type(config).__name__}; pass an mpt.MptConfig "
                "(MptConfig.from_dict takes the to_dict() of another library's)"
            )
        config.check()
        self.config = config

    def _materialize(self, device: torch.device) -> None:
        """Move what was built on meta to `device`, and initialise it there from a seed that torch's generator gives."""
        if device.type != "meta":
            self.to_empty(device=device)
            init_weights(self, int(torch.randint(2**62, (), device="cpu")))

    @classmethod
    def _architecture(cls) -> str:
        """The name of the class of this package that it is, or is made from, as fully_shard makes them."""
        return next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("mpt."))

    @property
    def base_model(self) -> "MptModel":
        """The MptModel inside; of an MptModel, itself."""
        model = getattr(self, self.base_model_prefix, self)
        assert isinstance(model, MptModel)
        return model

    @property
    def device(self) -> torch.device:
        """Where the parameters are (the first of them)."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are (the first of them)."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters; tied embeddings count once.

        only_trainable: those that require gradients. exclude_embeddings: not wte and wpe.
        """
        embeddings = {id(m.weight) for m in self.modules() if exclude_embeddings and isinstance(m, nn.Embedding)}
        return sum(
            p.numel() for p in self.parameters() if id(p) not in embeddings and (p.requires_grad or not only_trainable)
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """wte, weight (V, d)."""
        wte = self.base_model.wte
        assert isinstance(wte, nn.Embedding)
        return wte

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        """Put another nn.Embedding, weight (V, d), in wte's place; a tied lm_head follows. ValueError for another
        shape: `resize_token_embeddings` changes the vocabulary.
        """
        expected = (self.config.vocab_size, self.config.d_model)
        if not isinstance(embeddings, nn.Embedding):
            raise ValueError(
                f"embeddings are a {type(embeddings).__name__}; pass an nn.Embedding with weight {expected}"
            )
        if embeddings.weight.shape != expected:
            raise ValueError(
                f"embeddings have weight {tuple(embeddings.weight.shape)}; it must be (vocab_size, d_model) = "
                f"{expected}; resize_token_embeddings changes vocab_size"
            )
        self.base_model.wte = embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """The module that makes the logits over the vocabulary; None where there is none."""
        return None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the vocabulary to new_num_tokens (None: as it is), rounded up to a multiple; returns wte.

        Rows are cut off or added at the end of wte, and of an lm_head that is not tied; config.vocab_size follows.
        mean_resizing: new rows are the mean of the old ones; False: initialised as the configuration says.

        The weights are new Parameters: make the optimizer afterwards. ValueError where a special token's id would fall
        outside, or the weights are sharded.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        for name, value in (("new_num_tokens", size), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (not isinstance(value, int) or value <= 0):
                raise ValueError(f"{name} is {value!r}; it must be a positive whole number")
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        wte = self.get_input_embeddings()
        if size == self.config.vocab_size:
            return wte
        layers = [m for m in (wte, self.get_output_embeddings()) if isinstance(m, (nn.Embedding, nn.Linear))]
        layers = list(dict.fromkeys(layers))  # wte once where it is both
        if any(isinstance(layer.weight, DTensor) for layer in layers):
            raise ValueError("resize_token_embeddings cannot resize sharded weights; call it before fully_shard")
        changed = copy.copy(self.config)
        changed.vocab_size = size
        changed.check()
        old, self.config.vocab_size = self.config.vocab_size, size
        for layer in layers:
            weight = _resized(layer.weight.detach(), size)
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            setattr(layer, "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features", size)
        if not mean_resizing and size > old and self.device.type != "meta":
            self._draw_rows(layers, old)
        return wte

    @torch.no_grad()
    def _draw_rows(self, layers: list[Any], first: int) -> None:
        """Initialise the rows of these layers' weights from `first` on, as the configuration says."""
        kept = [layer.weight[:first].clone() for layer in layers]
        names = {name for name, p in self.named_parameters() if any(p is layer.weight for layer in layers)}
        init_weights(self, int(torch.randint(2**62, (), device="cpu")), only=names)
        for layer, rows in zip(layers, kept, strict=True):
            layer.weight[:first] = rows

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the blocks recompute in the backward what they do not keep."""
        return any(block.activation_checkpointing != "none" for block in self.base_model.blocks)  # type: ignore[misc]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In train mode every block keeps its input only and recomputes the rest in the backward.

        The arguments are transformers', of which only the defaults and {"use_reentrant": False} are supported;
        MptModel.set_activation_checkpointing has a cheaper mode, "selective".
        """
        given = (activation_checkpointing_kwargs or {}) | {"every_n_layers": every_n_layers, "offload": offload}
        for key, value in given.items():
            if value != {"use_reentrant": False, "every_n_layers": 1, "offload": False}.get(key):
                raise ValueError(
                    f"activation checkpointing is asked for {key}={value!r}; supported are use_reentrant=False, "
                    "every_n_layers=1 and offload=False"
                )
        self.base_model.set_activation_checkpointing("full")

    def activation_checkpointing_disable(self) -> None:
        """Blocks keep all that the backward needs."""
        self.base_model.set_activation_checkpointing("none")

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of activation_checkpointing_enable."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of activation_checkpointing_disable."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of is_activation_checkpointing."""
        return self.is_activation_checkpointing

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int | str = "5GB", dtype: torch.dtype | None = None
    ) -> None:
        """Write a folder that `from_pretrained` and transformers read: safetensors (in shards), and config.json.

        dtype: of the saved weights; None keeps each as it is. Replaces an older save in `folder`; see
        mpt.checkpoint.save_hf.
        """
        checkpoint.save_hf(
            self.named_parameters(),
            self.config,
            folder,
            max_shard_size=max_shard_size,
            dtype=dtype,
            architecture=self._architecture(),
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path | checkpoint.Source,
        *,
        config: MptConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """A model in eval mode from a checkpoint of any form; `init_device` plays no part.

        path_or_name: a Hugging Face folder, a Composer .pt, a training run's folder or a checkpoint in it; or a name on
            the Hugging Face hub, of which `revision` (a branch, tag or commit) is taken. What
            mpt.checkpoint.open_checkpoint gives is taken as it is.
        config: in place of the checkpoint's own.
        dtype: of the parameters, or its name; None or "auto" takes the checkpoint's.
        device: where the parameters are made, and to which each is read.
        overrides: fields of the configuration to change, such as num_labels=3 or attn_config={"clip_qkv": 6}.

        A classifier's head that the checkpoint does not have is initialised at random, with a warning.
        The host holds one tensor at a time besides what is on `device`. ValueError says what is not there, damaged or
        refused, or holds a table of the weights that do not fit; see mpt.checkpoint.open_checkpoint.
        """
        if config is not None and overrides:
            raise ValueError(f"config and {', '.join(overrides)} are given; set the fields in config")
        overrides, dtype = _config_fields(overrides), _floating(dtype)
        _check_device(torch.device(device))
        source = path_or_name
        if not isinstance(source, checkpoint.Source):
            source = checkpoint.open_checkpoint(source, revision=revision, check_hashes=True)
        with torch.device("meta"):
            model = cls(config or source.config(**overrides))
        stored = checkpoint.match(model, source)  # before memory is taken for what does not fit
        if config is not None:
            checkpoint.compare_config(config, source)
        model = model.to(dtype or source.dtype).to_empty(device=device)
        checkpoint.fill(model, stored)
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
        self._offload = False
        self._slopes: dict[torch.device, Tensor] = {}  # ALiBi's slopes by device: no buffer, so no key in a checkpoint
        self._materialize(device)

    def set_activation_checkpointing(self, mode: ActivationCheckpointing, *, offload: bool = False) -> None:
        """What the blocks keep for the backward in train mode: "none" recomputes nothing, "full" keeps a block's input
        only, "selective" its attention outputs as well, which are the dearest to compute again. offload: the inputs of
        blocks are kept in host memory, see mpt.offload; not with "none", where they are the smallest part.
        """
        if offload and mode == "none":
            raise ValueError('offload=True keeps the inputs of blocks that recompute the rest: mode must not be "none"')
        self._offload = offload
        for block in self.blocks:
            assert isinstance(block, MptBlock)
            block.activation_checkpointing = mode

    def set_mlp_chunk_size(self, tokens: int | None) -> None:
        """How many tokens the blocks' MLPs take at a time; None: all. See kernels.mlp."""
        for block in self.blocks:
            assert isinstance(block, MptBlock)
            block.ffn.chunk_size = tokens

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """Hidden states (B, S, d) of input_ids (B, S) int, or of inputs_embeds (B, S, d) in their place.

        attention_mask: (B, past + S), 1 or True where a token is real. Left and right padding both work; outputs at
            padding are unspecified but finite.
        sequence_id: (B, past + S) int, also called token_type_ids. With attn_uses_sequence_id tokens see their own
            sequence only, and -1 is padding; required in train mode.
        prefix_mask: (B, past + S), True at keys that every query sees; required with prefix_lm.
        output_attentions: also the probabilities (B, H, S, S) of each block, computed apart from the fast path.
        output_hidden_states: also what enters each block, (B, S, d). None for these and return_dict means the
            configuration's value.
        use_cache: also return past_key_values, an MptCache of what was read. None: where one is given, or, in eval
            mode, where the configuration says so.
        past_key_values: an MptCache of `past` columns, which the input follows. It is added to in place, and returned.
            Without attention_mask its padding stays padding. Gradients reach what this call reads, not what it holds.
        cache_position: (S,), past .. past + S - 1; nothing else is possible, so it may be left out.
        context: share each sequence with other ranks. All arguments are whole, the outputs are this rank's part: the
            positions that `context.take` gives. It has to be made from the attention_mask and sequence_id given here.
            Not with prefix_mask, output_attentions or a cache.

        ValueError names the argument that does not fit, TypeError one that does not exist.
        """
        refuse_unknown(MptModel.forward, kwargs)
        config = self.config
        given = self._given(input_ids, inputs_embeds)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if token_type_ids is not None:
            if sequence_id is not None:
                raise ValueError("sequence_id and token_type_ids are two names of one argument: give one of them")
            sequence_id = token_type_ids
        cache = self._cache(past_key_values, use_cache if context is None else bool(use_cache))
        past = 0 if cache is None else cache.columns
        _check_cache_position(cache_position, past, given.shape[1])
        rules = self._rules(given, attention_mask, sequence_id, prefix_mask, past)
        if context is not None:
            _check_context(context, given, rules, output_attentions, cache)
            rules.context = context
        step = self._step(cache, given, rules)
        x = self._embed(input_ids, inputs_embeds, rules, past)

        hidden: list[Tensor] = []
        attentions: list[Tensor] = []
        offload = HostOffload() if self._offload and self.training and torch.is_grad_enabled() else None
        for i, block in enumerate(self.blocks):
            if output_hidden_states:
                hidden.append(x)
            more: dict[str, Any] = {} if step is None else {"past": step.layer(i)}
            if output_attentions:
                x, probabilities = block(x, rules, output_attentions=True, **more)
                attentions.append(probabilities)
            elif offload is not None:
                with offload.input(x):
                    x = block(x, rules)
            else:
                x = block(x, rules, **more)
        x = self.norm_f(x)
        if step is not None:
            step.commit()
        out = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return out if (config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _given(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The one that is given, checked for shape and dtype."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        given = input_ids if input_ids is not None else inputs_embeds
        if not isinstance(given, Tensor):
            raise ValueError(f"input_ids and inputs_embeds are tensors, not {type(given).__name__}; call torch.tensor")
        if input_ids is not None and given.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids are {given.dtype}; they must be int64 or int32")
        if input_ids is None and not given.is_floating_point():
            raise ValueError(f"inputs_embeds are {given.dtype}; they must be floating (token ids are input_ids)")
        if given.dim() != (2 if input_ids is not None else 3) or 0 in given.shape:
            raise ValueError(
                f"input_ids must be (B, S) and inputs_embeds (B, S, d), none of them 0, not {tuple(given.shape)}"
            )
        if input_ids is None and given.shape[2] != self.config.d_model:
            raise ValueError(f"inputs_embeds are {tuple(given.shape)}; d_model is {self.config.d_model}")
        return given

    def _cache(self, given: Any, use_cache: bool | None) -> MptCache | None:
        """The cache that a call adds to: the given one, or a new one, or None."""
        if given is not None and not isinstance(given, MptCache):
            raise ValueError(
                f"past_key_values is {type(given).__name__}; pass an MptCache: a new one (`from mpt import MptCache`), "
                "or what a call with use_cache=True returned"
            )
        if given is not None and use_cache is False:
            raise ValueError("use_cache is False and past_key_values is given; leave one of them out")
        if use_cache is None:
            use_cache = given is not None or (self.config.use_cache and not self.training)
        if not use_cache:
            return None
        if any(block.recomputes() for block in self.blocks):  # type: ignore[operator]
            raise ValueError(
                "use_cache with activation checkpointing in train mode: the recomputation would fill the cache twice; "
                "set use_cache=False, or model.eval()"
            )
        return MptCache() if given is None else given

    def _step(self, cache: MptCache | None, given: Tensor, rules: AttentionRules) -> CacheStep | None:
        """The call's part of the cache; rules.attention_mask is completed by the padding that the cache remembers."""
        if cache is None:
            return None
        step = cache.begin(self, given.shape[0], given.shape[1], given.device, rules.attention_mask)
        rules.attention_mask = step.mask
        return step

    def _rules(
        self,
        given: Tensor,
        attention_mask: Tensor | None,
        sequence_id: Tensor | None,
        prefix_mask: Tensor | None,
        past: int,
    ) -> AttentionRules:
        """The arguments checked and brought to one form. Nothing here waits for a GPU."""
        attn, shape = self.config.attn_config, (given.shape[0], past + given.shape[1])
        for name, mask in (
            ("attention_mask", attention_mask),
            ("sequence_id", sequence_id),
            ("prefix_mask", prefix_mask),
        ):
            if mask is not None and not isinstance(mask, Tensor):
                raise ValueError(f"{name} is a {type(mask).__name__}; it must be a tensor (B, S) = {tuple(shape)}")
            if mask is not None and mask.shape != shape:
                wanted = (
                    f"(B, past + S) = {shape}, with the {past} columns of past_key_values"
                    if past
                    else f"(B, S) = {shape}"
                )
                raise ValueError(f"{name} is {tuple(mask.shape)}; it must be {wanted}")
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
            if attention_mask.dtype.is_signed and readable(attention_mask) and attention_mask.min() < 0:
                raise ValueError(
                    f"attention_mask holds {float(attention_mask.min())}; it is 1 where a token is real and 0 at "
                    "padding, not what is added to the scores"
                )
            attention_mask = attention_mask.bool()
            if not past and readable(attention_mask) and attention_mask.all():
                attention_mask = None  # no padding: the attention has less to do
        if sequence_id is not None and sequence_id.device.type != "cpu":
            sequence_id = int32_ids(sequence_id)  # once, not in each layer
        slopes = self._alibi_slopes(given.device) if attn.alibi else None
        return AttentionRules(slopes, attention_mask, sequence_id, None if prefix_mask is None else prefix_mask.bool())

    def _alibi_slopes(self, device: torch.device) -> Tensor:
        if device not in self._slopes:
            slopes = kernels.alibi_slopes(self.config.n_heads, self.config.attn_config.alibi_bias_max)
            self._slopes[device] = slopes.to(device)
        return self._slopes[device]

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, rules: AttentionRules, past: int
    ) -> Tensor:
        context, positions = rules.context, None
        if self.wpe is not None:
            positions = self._positions(input_ids if inputs_embeds is None else inputs_embeds, rules, past)
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

    def _positions(self, x: Tensor | None, rules: AttentionRules, past: int) -> Tensor:
        """(S,) or (B, S): a token's place among the real tokens of its row, for ids (B, S) or embeddings (B, S, d).
        Ids of -1 are padding here, too.
        """
        assert x is not None
        length, limit, real = past + x.shape[1], self.config.max_seq_len, rules.attention_mask
        if rules.sequence_id is not None:
            real = rules.sequence_id >= 0 if real is None else real & (rules.sequence_id >= 0)
        positions = torch.arange(past, length, device=x.device)
        if real is not None:
            positions = (positions - (~real).cumsum(1)[:, past:]).clamp(min=0)
        if length > limit and (real is None or (longest := int(positions.max()) + 1) > limit):
            got = length if real is None else longest
            raise ValueError(
                f"a sequence has {got} positions and max_seq_len is {limit}; learned positions go no further"
            )
        return positions


def _resized(weight: Tensor, rows: int) -> Tensor:
    """A copy of weight (V, d) with `rows` rows: the first ones, and if there are more, the mean of all of them."""
    if rows <= len(weight):
        return weight[:rows].clone()
    mean = weight.mean(0, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32))
    return torch.cat((weight, mean.to(weight.dtype).expand(rows - len(weight), -1)))


def _config_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides`, unless one is an argument of transformers' from_pretrained that has another name here, or none."""
    for name, instead in FOREIGN_ARGUMENTS.items():
        if name in overrides:
            raise TypeError(f"from_pretrained() takes no {name!r}; {instead}")
    return overrides


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that is meant; None: the checkpoint's."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; give float32, bfloat16 or float16, as torch.bfloat16 or its name")
    return named


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        return
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"device is {device}, but torch sees no GPU; give cpu, or install a CUDA build of torch")
    if (device.index or 0) >= count:
        raise ValueError(f"device is {device}, but torch sees {count} GPUs, whose numbers begin at 0; give another")


def refuse_unknown(
    method: Callable[..., Any], given: dict[str, Any], foreign: Mapping[str, str] = FOREIGN_INPUTS
) -> None:
    """TypeError for keyword arguments that a method does not have: with what `foreign` says of a name that other
    libraries have, else the nearest that it has.
    """
    for name in given:
        known = [n for n in list(inspect.signature(method).parameters)[1:] if n != "kwargs"]  # the first is the model
        close = difflib.get_close_matches(name, known, n=1)
        advice = foreign.get(name) or (f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}")
        raise TypeError(f"{method.__qualname__}() has no argument {name!r}; {advice}")


def _check_context(
    context: ContextSplit, given: Tensor, rules: AttentionRules, output_attentions: bool | None, cache: MptCache | None
) -> None:
    if given.shape[1] != context.length:
        raise ValueError(f"the sequences have {given.shape[1]} tokens and context was made for {context.length}")
    if context.documents and rules.sequence_id is None:
        raise ValueError("context was made from sequence_id, which this model's attention does not use: leave it out")
    if output_attentions:
        raise ValueError("output_attentions does not work where ranks share sequences (context); leave it out")
    if cache is not None:
        raise ValueError("a cache does not work where ranks share sequences (context); leave past_key_values out")


def building_device(config: MptConfig) -> torch.device:
    """Where a model is built: the device of a `with torch.device(...)` around it, else as `init_device` says."""
    around = torch.get_default_device()
    if around.type != "cpu" or config.init_device == "cpu":
        return around
    if config.init_device == "mixed":
        return torch.device("cpu" if int(os.environ.get("LOCAL_RANK", "0")) == 0 else "meta")
    return torch.device(config.init_device)


def attention_probabilities(q: Tensor, k: Tensor, rules: AttentionRules, softmax_scale: float | None) -> Tensor:
    """softmax(scale*q.k - slope*|i - j|) over visible keys, in fp32, cast to q's dtype: (B, H, S, T) from q (B, S, H,
    D), the last S positions, and k (B, T, G, D).

    Before dropout. A query that sees no key has zeros.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bshd,bthd->bhst", q.to(wide), k.to(wide)) * scale
    place = torch.arange(k.shape[1], device=q.device)
    own = place[-q.shape[1] :, None]
    if rules.alibi_slopes is not None:
        scores = scores - rules.alibi_slopes[:, None, None] * (own - place).abs()
    visible = (own >= place)[None, None]
    if rules.prefix_mask is not None:
        visible = visible | rules.prefix_mask[:, None, None, :]
    if rules.attention_mask is not None:
        visible = visible & rules.attention_mask[:, None, None, :]
    if (ids := rules.sequence_id) is not None:
        visible = visible & (ids[:, None, -q.shape[1] :, None] == ids[:, None, None, :])
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0).to(q.dtype)


def _check_cache_position(given: Tensor | None, past: int, length: int) -> None:
    if given is None:
        return
    if given.shape != (length,):
        raise ValueError(f"cache_position is {tuple(given.shape)}; it must be (S,) = ({length},), or left out")
    if (found := given.tolist()) != list(range(past, past + length)):
        raise ValueError(
            f"cache_position is {found[0]}..{found[-1]}; past_key_values holds {past} columns, so it must be {past}.."
            f"{past + length - 1} (crop the cache to go back), or left out"
        )


def readable(mask: Tensor) -> bool:
    """Whether its values can be looked at here for nothing: on a CPU, outside tracing."""
    return type(mask) is Tensor and mask.device.type == "cpu" and not torch.compiler.is_compiling()
