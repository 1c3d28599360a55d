"""The YAML sections `train_loader` and `eval_loader`: which shard sets or examples are read, and in which order."""

from dataclasses import dataclass, field
from typing import Literal

from trainer.errors import InputError


@dataclass(frozen=True)
class MixEntry:
    """One source of a mix: a folder of token shards, and its share of the sequences relative to the other weights."""

    local: str
    split: str | None = None  # None: the loader's own split, `dataset.split`
    weight: float = 1.0


@dataclass(frozen=True)
class FieldsConfig:
    """What a data set of examples calls its fields. None: the first of the usual names that an example has.

    roles: a data set's own names of the roles -> system, user or assistant.
    """

    prompt: str = "prompt"
    instruction: str = "instruction"
    context: str | None = None
    response: str | None = None
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetConfig:
    """Where the data is. Token shards: `local`, one folder made by scripts/prepare_data.py, or `mix`, several with
    weights. Examples (`name: finetuning`): `local`, a file, folder or glob, or `hf_name`; and the keys below it.
    """

    local: str | None = None
    split: str | None = None  # None: "train" in train_loader, "val" in eval_loader; examples: see finetune.py
    shuffle: bool = True  # evaluation always reads in order: its mean does not depend on it
    shuffle_seed: int | None = None  # None: the run's seed
    mix: list[MixEntry] | None = None
    hf_name: str | None = None
    template: str | None = None  # trainer.data.templates.Template; None: by the example
    system_prompt: str | None = None
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    packing: bool = False
    too_long: Literal["drop", "cut"] = "drop"  # an example of more than max_seq_len tokens


# Keys of a dataset that belong to one kind of loader.
TEXT_ONLY = ("mix",)
EXAMPLES_ONLY = ("hf_name", "template", "system_prompt", "fields", "packing", "too_long")


@dataclass(frozen=True)
class LoaderConfig:
    """A loader: of token shards (text) or of examples (finetuning). `num_workers` is how many steps the background
    thread keeps ready (0: no thread).

    `drop_last` is llm-foundry's key and both values are right here: training runs on across epochs and evaluation
    counts its last, shorter batch exactly, so there is no incomplete batch to drop.
    """

    name: Literal["text", "finetuning"] = "text"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    num_workers: int = 2
    drop_last: bool = True

    def check(self, section: str) -> None:
        """InputError for a key of the other kind of loader; section: this one's key."""
        foreign, kind = (EXAMPLES_ONLY, "finetuning") if self.name == "text" else (TEXT_ONLY, "text")
        defaults = DatasetConfig()
        for key in foreign:
            if getattr(self.dataset, key) != getattr(defaults, key):
                raise InputError(f"{section}.dataset.{key} is for a loader of name: {kind}, this one is {self.name}")
