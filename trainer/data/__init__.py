"""Data: preparing token shards, reading them in a fixed order, mixing several sets; examples for fine-tuning."""

from trainer.data.batches import TokenBatches, open_loader
from trainer.data.config import DatasetConfig, LoaderConfig, MixEntry
from trainer.data.finetune import ExampleBatches, open_examples
from trainer.data.prefetch import Prefetcher
from trainer.data.shards import read_manifest, scan, unigram_entropy
from trainer.data.tokenizer import file_sha256, find_tokenizer

__all__ = [
    "DatasetConfig",
    "ExampleBatches",
    "LoaderConfig",
    "MixEntry",
    "Prefetcher",
    "TokenBatches",
    "file_sha256",
    "find_tokenizer",
    "open_examples",
    "open_loader",
    "read_manifest",
    "scan",
    "unigram_entropy",
]
