"""The MPT model: configuration, transformer, language-model head, weights on disk, generation. Imports kernels only."""

from mpt.config import MptAttentionConfig, MptConfig
from mpt.heads import MptForCausalLM
from mpt.model import MptModel, MptPreTrainedModel

__all__ = ["MptAttentionConfig", "MptConfig", "MptForCausalLM", "MptModel", "MptPreTrainedModel"]
