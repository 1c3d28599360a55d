"""Operations on tensors for MPT models: attention with ALiBi, norms, MLP, loss, Lion.

Knows nothing of models, and imports no other package of this project. Every operation has a specification of the same
name in `kernels.reference`.
"""

import importlib.metadata
import warnings

from kernels import reference
from kernels.alibi import alibi_slopes
from kernels.decode_attention import decode_attention, update_key_norms
from kernels.flash_attention import flash_attention
from kernels.layer_norm import layer_norm, rms_norm
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.lion import lion_step
from kernels.mlp import mlp

__all__ = [
    "alibi_slopes",
    "decode_attention",
    "flash_attention",
    "layer_norm",
    "linear_cross_entropy",
    "lion_step",
    "mlp",
    "reference",
    "rms_norm",
    "update_key_norms",
]


def _warn_of_namesake() -> None:
    """Hugging Face has a distribution that is called `kernels` as well."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"Hugging Face's `kernels` {version} is installed beside this project's package of that name: one hides the "
        "other, and transformers fails on import or loads no hub kernels. Remove it: pip uninstall kernels",
        stacklevel=2,
    )


_warn_of_namesake()
