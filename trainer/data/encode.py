"""From documents to token ids, their split and their excerpts: what the workers of a preparation compute."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trainer.data.shards import DTYPES
from trainer.data.sources import Document, Piece, Reading, read_piece
from trainer.data.tokenizer import keep_as_text, open_tokenizer
from trainer.errors import InputError

BATCH_CHARS = 1 << 18
MAX_CHARS = 1 << 20  # of one call to the tokenizer: it needs about 200 bytes of memory per token

Ids = npt.NDArray[Any]
Rest = Literal["drop", "overlap", "pad"]


@dataclass(frozen=True)
class Excerpts:
    """How documents are cut into excerpts of `tokens` tokens each, of which none reaches into another document.

    rest: what becomes of the tokens after a document's last whole excerpt. "drop": they are left out; "overlap": the
    document's last `tokens` tokens are one more excerpt, which begins inside the one before it; "pad": they are an
    excerpt filled up with end-of-document tokens. A rest of fewer than min_tokens is left out in any case. So is a
    document shorter than an excerpt, unless it is padded.
    """

    tokens: int
    rest: Rest
    min_tokens: int


@dataclass(frozen=True)
class Encoding:
    """What decides a document's ids and its split: a part made under the same encoding is kept."""

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str
    val_fraction: float
    seed: int
    reading: Reading
    excerpts: Excerpts | None = None


@lru_cache(maxsize=1)
def load_tokenizer(path: str, sha256: str, control: tuple[int, ...]) -> Tokenizer:
    """A tokenizer that takes whole texts. control: ids of added tokens that no text may spell, special or not there."""
    tokenizer = open_tokenizer(path)
    keep_as_text(tokenizer, control)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(pieces: Iterable[Piece], encoding: Encoding) -> Iterator[tuple[str, Ids]]:
    """("train" or "val", ids) for the pieces' documents in order; a long document comes in several runs of ids."""
    waiting: list[tuple[str, str, bool]] = []  # (split, text, whether the document ends with it)
    chars = 0
    for piece in pieces:
        for number, document in enumerate(read_piece(piece, encoding.reading)):
            split = "val" if piece.validation or _chosen(document, encoding) else "train"
            if not isinstance(document, str):
                if encoding.excerpts is not None:
                    raise InputError(
                        f"{piece.path}: holds tokens, not texts, so where its documents end is not known; "
                        "--excerpt-tokens needs texts"
                    )
                _check_ids(document, piece, number, encoding.vocab_size)
                yield split, document
                continue
            runs = list(_runs(document))
            for i, run in enumerate(runs):
                waiting.append((split, run, i == len(runs) - 1))
                chars += len(run)
                if chars >= BATCH_CHARS:
                    yield from _encode_batch(waiting, encoding)
                    waiting, chars = [], 0
        # Emptied at every piece, so that text never waits behind the ready-made ids of the next.
        yield from _encode_batch(waiting, encoding)
        waiting, chars = [], 0


def _encode_batch(waiting: list[tuple[str, str, bool]], encoding: Encoding) -> Iterator[tuple[str, Ids]]:
    tokenizer = load_tokenizer(encoding.tokenizer, encoding.tokenizer_sha256, (encoding.eos_id,))
    encoded = tokenizer.encode_batch_fast([text for _, text, _ in waiting], add_special_tokens=False)
    for (split, _, ends), result in zip(waiting, encoded):
        ids = result.ids
        if ends:
            ids.append(encoding.eos_id)
        yield split, np.array(ids, dtype=DTYPES[encoding.dtype])


@dataclass
class Cutter:
    """Cuts documents into excerpts, and counts what is left out: whole documents, and tokens with them or as rests."""

    excerpts: Excerpts
    eos_id: int
    documents_left_out: int = 0
    tokens_left_out: int = 0

    def __call__(self, runs: Iterable[tuple[str, Ids]]) -> Iterator[tuple[str, Ids]]:
        """What `encode` gives for texts as (split, the excerpts of a document one after the other)."""
        open_: list[Ids] = []
        for split, ids in runs:
            open_.append(ids)
            if ids[-1] == self.eos_id:  # no text spells it: it ends the document
                yield split, self._cut(np.concatenate(open_))
                open_ = []

    def _cut(self, ids: Ids) -> Ids:
        size = self.excerpts.tokens
        whole = len(ids) // size * size
        rest = len(ids) - whole
        cut = ids[:whole]
        if rest >= max(self.excerpts.min_tokens, 1) and self.excerpts.rest == "pad":
            return np.concatenate([ids, np.full(size - rest, self.eos_id, ids.dtype)])
        if rest >= max(self.excerpts.min_tokens, 1) and self.excerpts.rest == "overlap" and whole:
            return np.concatenate([cut, ids[-size:]])
        self.documents_left_out += not whole
        self.tokens_left_out += rest
        return cut


def _runs(text: str) -> Iterator[str]:
    """A text in runs of at most MAX_CHARS, cut before a newline that follows a visible character.

    Byte-level tokenizers of GPT-2's kind split there anyway, so their ids are those of the whole text.
    """
    start = 0
    while len(text) - start > MAX_CHARS:
        stop = text.rfind("\n", start + 1, start + MAX_CHARS)
        while stop > start and text[stop - 1].isspace():
            stop = text.rfind("\n", start + 1, stop)
        if stop <= start:
            stop = start + MAX_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _chosen(document: Document, encoding: Encoding) -> bool:
    """Whether a document falls into validation."""
    if not encoding.val_fraction:
        return False
    content = document.encode("utf-8") if isinstance(document, str) else document.tobytes()
    digest = hashlib.blake2b(content, digest_size=8, key=encoding.seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < encoding.val_fraction * 2**64


def _check_ids(ids: Ids, piece: Piece, number: int, vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{piece.path}, shard {piece.start}, sample {number}: token id {low if low < 0 else high} is not in "
            f"0..{vocab_size - 1}, the tokenizer's ids; give the tokenizer the samples were made with, "
            "or the integers' type with --mds-dtype"
        )
