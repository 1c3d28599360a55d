"""Evaluation on token shards: the mean loss over every token that counts, the same on any number of ranks."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, pre_tokenizers

from mpt import MptConfig, MptForCausalLM
from mpt.checkpoint import Source, fill, match
from trainer.data import DatasetConfig, ExampleBatches, LoaderConfig, TokenBatches, file_sha256, open_loader
from trainer.data.tokenizer import TOKENIZER, find_tokenizer, open_tokenizer, settings_files
from trainer.errors import InputError
from trainer.parallel import FsdpConfig, World, materialize, shard_model

TOKENS_PER_BATCH = 8192  # of a forward, where no batch size is given


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split.

    loss: mean nats per predicted token. tokens: how many were predicted, every sequence's but its first. text_bytes:
    that these stand for, None where it is not known. seconds: wall time.
    """

    loss: float
    tokens: int
    text_bytes: int | None
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """The whole loss in bits, over the text's bytes: what tokenizers of different kinds can be compared by."""
        return self.loss * self.tokens / (math.log(2) * self.text_bytes) if self.text_bytes else None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def forward_arguments(
    data: TokenBatches | ExampleBatches, array: npt.NDArray[Any], config: MptConfig, valid: int | None = None
) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model's forward for rows that `data` gave, on the CPU. valid: how many of them count;
    None: all.
    """
    attn = config.attn_config
    given = data.arguments(array, sequence_id=attn.attn_uses_sequence_id, prefix_mask=attn.prefix_lm)
    batch = {name: torch.from_numpy(value) for name, value in given.items()}
    if valid is not None:
        batch["labels"] = batch["labels"].clone()  # they may be the inputs themselves
        batch["labels"][valid:] = -100
    return batch


def mean_loss(
    model: MptForCausalLM, data: TokenBatches, world: World, *, batch_size: int, sequences: int | None = None,
    token_bytes: npt.NDArray[np.int64] | None = None,
    advance: Callable[[int, int], None] = lambda sequences, tokens: None,
) -> Evaluation:  # fmt: skip
    """Every sequence of `data` once, or its first `sequences`: collective, and equal on all ranks. The mode of the
    model, which should be eval, is the caller's.

    batch_size: sequences of a forward on each rank. token_bytes: as the function of that name gives them.
    advance: told each batch's sequences and tokens, over all ranks.
    """
    total, counted, text_bytes, started = 0.0, 0, 0, time.perf_counter()
    with torch.no_grad():
        for ids, valid in data.eval_batches(world.rank, world.size, batch_size, sequences):
            batch = forward_arguments(data, ids, model.config, valid)
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            counted += tokens
            if token_bytes is not None:
                text_bytes += int(token_bytes[ids[:valid, 1:]].sum())
            batch = {k: v.to(world.device) for k, v in batch.items()}
            out = model(**batch, num_items_in_batch=1, return_logits=False, use_cache=False, return_dict=True)
            total += float(out.loss)
            sequences_everywhere, tokens_everywhere = world.sum(valid, tokens)
            advance(int(sequences_everywhere), int(tokens_everywhere))
    loss_sum, tokens_sum, bytes_sum = world.sum(total, counted, text_bytes)
    return Evaluation(
        loss=loss_sum / max(tokens_sum, 1.0),
        tokens=int(tokens_sum),
        text_bytes=None if token_bytes is None else int(bytes_sum),
        seconds=time.perf_counter() - started,
    )


def load_model(
    source: Source, world: World, dtype: torch.dtype | None = None, *, whole: bool = False
) -> MptForCausalLM:
    """The model of an open checkpoint, in eval mode: sharded over the processes, each of which reads its own rows; or,
    for one and with `whole`, whole on each.

    dtype: of the weights; None takes the checkpoint's. InputError where it is not a causal language model's.
    """
    try:
        with torch.device("meta"):
            model = MptForCausalLM(source.config())
        stored = match(model, source)
        model = model.to(dtype or source.dtype)
        if world.size > 1 and not whole:
            shard_model(model, world.mesh, FsdpConfig(), bf16=False)
        materialize(model, world.device, cpu_offload=False)
        fill(model, stored)
    except ValueError as error:
        raise InputError(str(error)) from None
    model.eval()
    return model


def open_shards(
    folder: str | Path, config: MptConfig, tokenizer: bytes | None, *, split: str = "val", seq_len: int | None = None
) -> TokenBatches:
    """A split of a folder of token shards, to be read in order by a model of this configuration.

    Each shard is cut into sequences of seq_len tokens (None: max_seq_len) one after the other, across the ends of
    documents; its last tokens, fewer than seq_len, are not read.

    tokenizer: the contents of the model's tokenizer.json; None leaves the comparison out. InputError where the shards
    are of another tokenizer, hold ids that the model does not have, or are shorter than a sequence.
    """
    length = config.max_seq_len if seq_len is None else seq_len
    if length < 2:
        raise InputError(f"--seq-len {length}: a sequence has 2 tokens at least, one to predict the other from")
    if config.learned_positions and length > config.max_seq_len:
        raise InputError(
            f"--seq-len {length}: the model's learned positions end at max_seq_len {config.max_seq_len}; give at most "
            "that"
        )
    loader = LoaderConfig(dataset=DatasetConfig(local=str(folder), split=split))
    data = open_loader(
        loader, seq_len=length, global_batch_size=1, seed=0, vocab_size=config.vocab_size, training=False
    )
    beside, wanted = _tokenizer_beside(data), data.sources[0].shards.manifest.tokenizer_sha256
    if tokenizer is None or (found := hashlib.sha256(tokenizer).hexdigest()) == wanted:
        return data
    if beside is None or not _equal_json(tokenizer, beside.read_bytes()):  # a Composer file keeps values, not bytes
        raise InputError(
            f"{folder}: the shards were made with a tokenizer of SHA-256 {wanted[:12]}..., the checkpoint's has "
            f"{found[:12]}...: prepare the data with the checkpoint's, or, if both give the same ids, name the data's "
            f"with --tokenizer {folder}"
        )
    return data


def token_bytes(data: TokenBatches, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """How many bytes of text each id of the shards stands for: (vocab_size,).

    Special tokens, such as the one that ends a document, stand for none. None where that cannot be told: the copy of
    the tokenizer beside the shards is missing or another, or is no byte-level one.
    """
    path = _tokenizer_beside(data)
    if path is None:
        return None
    tokenizer = open_tokenizer(path)
    if not _is_byte_level(tokenizer):
        return None
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())  # a letter for each byte
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
        if i < vocab_size:
            sizes[i] = len(token) if alphabet.issuperset(token) else len(token.encode())
    for i, added in tokenizer.get_added_tokens_decoder().items():
        if i < vocab_size:
            sizes[i] = 0 if added.special else len(added.content.encode())
    return sizes


def _tokenizer_beside(data: TokenBatches) -> Path | None:
    """The copy of the shards' tokenizer.json beside them; None where it is missing or another."""
    manifest = data.sources[0].shards.manifest
    path = manifest.folder / manifest.tokenizer_file
    return path if path.is_file() and file_sha256(path) == manifest.tokenizer_sha256 else None


def _equal_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in decoder.get("decoders", [decoder]))


def tokenizer_files(source: Source, name: str | None = None) -> dict[str, bytes]:
    """Contents of tokenizer.json and of the settings beside it: those of the checkpoint, or of the tokenizer `name`, as
    trainer.data.find_tokenizer takes it. Empty where the checkpoint has none.
    """
    if name is None:
        return source.companions if TOKENIZER in source.companions else {}
    path = find_tokenizer(name)
    return {TOKENIZER: path.read_bytes(), **{file.name: file.read_bytes() for file in settings_files(path)}}
