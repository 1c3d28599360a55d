"""The MPT model: configuration, transformer, language-model head, weights on disk, generation. Imports kernels only."""

from mpt.cache import MptCache
from mpt.config import MptAttentionConfig, MptConfig
from mpt.heads import MptForCausalLM
from mpt.model import MptModel, MptPreTrainedModel

__all__ = ["MptAttentionConfig", "MptCache", "MptConfig", "MptForCausalLM", "MptModel", "MptPreTrainedModel"]
