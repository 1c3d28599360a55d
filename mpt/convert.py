"""A checkpoint of any form made a Hugging Face folder or a Composer file, tensor by tensor, and proof that it is still
the same model.
"""

import math
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mpt import heads
from mpt.checkpoint import Source, companions_in, model_tensors, save_hf
from mpt.composer import save_composer
from mpt.model import MptPreTrainedModel
from mpt.tensor_files import Stored

CHECK_TOKENS = 64


def convert(
    source: Source,
    to: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: str | Path | None = None,
) -> int:
    """Write a checkpoint as `to`: a Composer file where that ends in .pt, else a Hugging Face folder, of the class that
    the checkpoint is of. Returns the number of parameters.

    dtype: of the weights; None keeps them as they are. max_shard_size: of the files of a folder. tokenizer: a folder
        whose tokenizer files are put in the place of the checkpoint's own.

    At most a shard is held in memory, one tensor for a Composer file. ValueError, before anything is written, where
    the weights are not those of the configuration, `to` is the checkpoint itself, or the disk lacks the room.
    """
    to, config = Path(to), source.config()
    if to.resolve() in (source.path.resolve(), *source.path.resolve().parents):
        raise ValueError(f"{to} is, or holds, the checkpoint that is converted; give another place")
    companions = source.companions if tokenizer is None else _companions(Path(tokenizer))
    if to.suffix == ".pt" and source.architecture != "MptForCausalLM":
        raise ValueError(
            f"{source.path} is of {source.architecture}, and a Composer file holds a language model; give a folder"
        )
    stored = model_tensors(source, config, source.architecture)
    tensors = [(name, partial(_cast, name, tensor, dtype)) for name, tensor in stored.items()]
    forms = {name: (tensor.shape, dtype or tensor.dtype or source.dtype) for name, tensor in stored.items()}
    _check_room(to, sum(math.prod(shape) * kind.itemsize for shape, kind in forms.values()))
    if to.suffix == ".pt":
        to.parent.mkdir(parents=True, exist_ok=True)
        save_composer(tensors, forms, config, to, companions=companions)
    else:
        save_hf(
            tensors, config, to, max_shard_size=max_shard_size, companions=companions, architecture=source.architecture
        )
    return sum(math.prod(shape) for shape, _ in forms.values())


def _companions(folder: Path) -> dict[str, bytes]:
    files = companions_in(folder)
    if "tokenizer.json" not in files:
        raise ValueError(f"tokenizer {folder} is no folder with a tokenizer.json; give one that is")
    return files


def _cast(name: str, stored: Stored, dtype: torch.dtype | None) -> Tensor:
    tensor = stored.rows(0, stored.shape[0])
    if dtype is None or dtype == tensor.dtype:
        return tensor
    cast = tensor.to(dtype)
    if not _finite(cast) and _finite(tensor):
        raise ValueError(f"{name} holds numbers beyond the range of {str(dtype).removeprefix('torch.')}; use bfloat16")
    return cast


def _finite(tensor: Tensor) -> bool:
    """By its extremes, which NaN goes through as well: no second tensor is made for the question."""
    return all(math.isfinite(float(extreme)) for extreme in tensor.aminmax())


def _check_room(to: Path, needed: int) -> None:
    there = next(folder for folder in to.resolve().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(f"{there} has {free / 1e9:,.1f} GB free, and the weights take {needed / 1e9:,.1f} GB")


def logits_difference(source: Source, to: str | Path, *, dtype: torch.dtype | None = None) -> float:
    """max|a-b| / max|a| of the logits of a checkpoint (a), cast to `dtype`, and of what it was converted to (b).

    The models are loaded one after the other. Infinite where a logit is not finite.
    """
    kind = getattr(heads, source.architecture)
    a = _logits(kind.from_pretrained(source, dtype=dtype))
    b = _logits(kind.from_pretrained(to))
    difference = float((a - b).abs().max() / a.abs().max())
    return difference if math.isfinite(difference) else math.inf


@torch.no_grad()
def _logits(model: MptPreTrainedModel) -> Tensor:
    """Every logit for fixed tokens, fp32."""
    tokens = min(CHECK_TOKENS, model.config.max_seq_len)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    prefix_mask = torch.zeros_like(ids, dtype=torch.bool) if model.config.attn_config.prefix_lm else None
    out = model(ids, prefix_mask=prefix_mask, return_dict=True)
    return torch.cat([value.float().flatten() for name, value in out.items() if name.endswith("logits")])
