"""The YAML sections `train_loader` and `eval_loader`: which shard sets are read, and in which order."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MixEntry:
    """One source of a mix: a folder of token shards, and its share of the sequences relative to the other weights."""

    local: str
    split: str | None = None  # None: the loader's own split, `dataset.split`
    weight: float = 1.0


@dataclass(frozen=True)
class DatasetConfig:
    """Where the tokens are: `local`, one folder made by scripts/prepare_data.py, or `mix`, several with weights."""

    local: str | None = None
    split: str | None = None  # None: "train" in train_loader, "val" in eval_loader
    shuffle: bool = True  # evaluation always reads in order: its mean does not depend on it
    shuffle_seed: int | None = None  # None: the run's seed
    mix: list[MixEntry] | None = None


@dataclass(frozen=True)
class LoaderConfig:
    """A loader. `num_workers` is how many steps the background thread keeps ready (0: no thread).

    `drop_last` is llm-foundry's key and both values are right here: training runs on across epochs and evaluation
    counts its last, shorter batch exactly, so there is no incomplete batch to drop.
    """

    name: Literal["text"] = "text"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    num_workers: int = 2
    drop_last: bool = True
