"""LoRA: adapters of low rank on a frozen base, through peft, and what is left of a run that trained them.

y = W x + alpha / rank * B A dropout(x) in each target, of which only A (rank, in) and B (out, rank) train. Hu et al.,
arXiv:2106.09685.
"""

import hashlib
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpt import MptConfig, MptForCausalLM
from mpt.checkpoint import model_tensors, open_checkpoint
from mpt.config import parameter_shapes
from mpt.initialize import is_adapter
from mpt.tensor_files import Stored
from trainer.errors import InputError
from trainer.quantized import BLOCK, quantize

if TYPE_CHECKING:
    import peft

TARGETS = ("Wqkv", "out_proj", "up_proj", "down_proj")
ADAPTER = "default"  # peft's name for the only one


@dataclass(frozen=True)
class LoraConfig:
    """Train adapters in place of the model.

    rank: of the change to each weight. alpha: the change is multiplied by alpha / rank. dropout: of the adapters'
    input. target_modules: the layers of every block that get one. base_bits: in how many bits the blocks' linear layers
    are kept, 4 or 8, on every process whole; null: in the dtype that they compute in, divided among processes.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: list(TARGETS))
    base_bits: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank={self.rank}; expected at least 1")
        if not 0 < self.alpha < float("inf"):
            raise InputError(f"lora.alpha={self.alpha}; expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout={self.dropout}; expected at least 0 and below 1")
        unknown = [name for name in self.target_modules if name not in TARGETS]
        if unknown or not self.target_modules:
            wrong = f"{', '.join(unknown)}: no such layer" if unknown else "no layer is named"
            raise InputError(f"lora.target_modules: {wrong}; an MPT's blocks have {', '.join(TARGETS)}")
        if self.base_bits not in (None, *BLOCK):
            raise InputError(f"lora.base_bits={self.base_bits}; expected 4, 8 or null")
        if len(set(self.target_modules)) < len(self.target_modules):
            raise InputError(f"lora.target_modules={self.target_modules} names a layer twice; name each once")

    @property
    def unfuses_mlp(self) -> bool:
        """Whether an MLP's projections are no plain layers any more, which takes it off its fused kernel."""
        return self.base_bits is not None or not {"up_proj", "down_proj"}.isdisjoint(self.target_modules)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


def check(config: LoraConfig, model_config: MptConfig) -> None:
    """Raises InputError where a package is missing, or an adapter would be no smaller than what it adapts."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora is set, but peft is not installed: pip install 'mpt-train[lora]', or remove the section")
    if config.base_bits is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"lora.base_bits={config.base_bits}, but bitsandbytes is not installed: pip install 'mpt-train[quantize]', "
            "or remove the key"
        )
    for name, (out_features, in_features) in target_shapes(config, model_config).items():
        if config.rank >= min(out_features, in_features):
            raise InputError(
                f"lora.rank={config.rank}: {name} is {out_features} x {in_features}, so an adapter of that rank "
                "constrains nothing; choose a lower rank (8 to 64 are usual)"
            )


def target_shapes(config: LoraConfig, model_config: MptConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of each target in one block, by its name."""
    prefix = "transformer.blocks.0."
    shapes = {name: shape for name, shape in parameter_shapes(model_config).items() if name.startswith(prefix)}
    found = {name.split(".")[-2]: shape for name, shape in shapes.items() if name.endswith(".weight")}
    return {name: (found[name][0], found[name][1]) for name in config.target_modules}


def count_adapters(config: LoraConfig, model_config: MptConfig) -> int:
    """The number of parameters that train."""
    return model_config.n_layers * config.rank * sum(sum(s) for s in target_shapes(config, model_config).values())


def add_adapters(model: MptForCausalLM, config: LoraConfig, *, base_dtype: torch.dtype) -> None:
    """Put adapters around the targets of a model on meta, in place. They alone require gradients, in fp32; the base's
    parameters are cast to base_dtype; its linear layers' weights are gone with base_bits, until they are loaded.
    """
    from peft import inject_adapter_in_model

    model.to(base_dtype)
    inject_adapter_in_model(_peft_config(config), model, ADAPTER)
    for parameter in adapters(model).values():
        parameter.data = parameter.data.float()
    if config.base_bits is not None:
        quantize(model, TARGETS, config.base_bits)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


def base_sha256(load_path: str, model_config: MptConfig) -> str:
    """What tells a base from others, wherever it lies and in whichever form: a SHA-256 of every weight's first row.

    Reading all of them would cost as much as loading. Raises InputError if there is none that fits.
    """
    digest = hashlib.sha256()
    for name, stored in _base(load_path, model_config).items():
        digest.update(name.encode() + stored.rows(0, 1).float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def merged(
    model: nn.Module, config: LoraConfig, load_path: str, model_config: MptConfig, *, write: bool
) -> Iterator[tuple[str, partial[Tensor]]]:
    """(name, function that gives it) of every weight of the base, read from its checkpoint, with the adapters' change
    added in fp32. Collective.

    write: whether this rank needs the values; others get tensors on meta.
    """
    changes = {name: _whole(parameter) for name, parameter in adapters(model).items()}
    for name, stored in _base(load_path, model_config).items():
        a, b = (changes.get(f"{name.removesuffix('weight')}lora_{part}.{ADAPTER}.weight") for part in "AB")
        yield name, partial(_merge, stored, a, b, config.scale) if write else partial(_shape_only, stored)


def save_adapters(model: nn.Module, config: LoraConfig, load_path: str, folder: Path, *, write: bool) -> None:
    """Write the adapters in peft's format: adapter_model.safetensors, adapter_config.json. Collective; an older folder
    is replaced. OSError where it cannot be written, on the rank that writes.
    """
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": _whole(parameter).contiguous()
        for name, parameter in adapters(model).items()
    }
    if not write:
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    saved = _peft_config(config, base=load_path)
    saved.inference_mode = True
    saved.save_pretrained(str(temporary))
    save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _peft_config(config: LoraConfig, base: str | None = None) -> "peft.LoraConfig":
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=config.rank,
        lora_alpha=int(config.alpha) if config.alpha % 1 == 0 else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def _base(load_path: str, model_config: MptConfig) -> dict[str, Stored]:
    try:
        return model_tensors(open_checkpoint(load_path), model_config)
    except (ValueError, OSError) as e:
        raise InputError(f"the base of the adapters, load_path={load_path}: {e}") from e


def _merge(stored: Stored, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    weight = stored.rows(0, stored.shape[0]).float()
    return weight if a is None or b is None else weight + scale * (b @ a)


def _shape_only(stored: Stored) -> Tensor:
    return torch.empty(stored.shape, device="meta")


def _whole(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
