"""The MPT model, as transformers' users know it: configuration, models with their heads, weights on disk, generation.

MptConfig and MptAttentionConfig describe a model. MptForCausalLM is the language model, with `generate`;
MptForSequenceClassification, MptForTokenClassification and MptForQuestionAnswering classify; MptModel is what they
stand on, without a head. All are MptPreTrainedModels, with `from_pretrained` and `save_pretrained`. What their forwards
return is in mpt.outputs. MptCache holds keys and values between calls.

    model = MptForCausalLM.from_pretrained("folder")
    loss = model(input_ids, labels=input_ids).loss

Imports kernels only.
"""

from mpt.cache import MptCache
from mpt.config import MptAttentionConfig, MptConfig
from mpt.heads import (
    MptForCausalLM,
    MptForQuestionAnswering,
    MptForSequenceClassification,
    MptForTokenClassification,
)
from mpt.model import MptModel, MptPreTrainedModel

__all__ = [
    "MptAttentionConfig",
    "MptCache",
    "MptConfig",
    "MptForCausalLM",
    "MptForQuestionAnswering",
    "MptForSequenceClassification",
    "MptForTokenClassification",
    "MptModel",
    "MptPreTrainedModel",
]
