"""Examples with responses: read from their files, rendered by a template, and tokenised."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trainer.data.encode import load_tokenizer
from trainer.data.order import IntArray
from trainer.data.sources import InputFile, read_rows
from trainer.data.templates import IM_END, IM_START, Marker, Segment, Template, token_examples
from trainer.data.tokenizer import file_sha256, find_eos, keep_as_text
from trainer.errors import InputError

ENCODED_AT_ONCE = 1 << 12  # examples in one call to the tokenizer
PLACES = 3  # examples that a report names

Rendered = tuple[str, str, list[Segment]]  # place, form, segments of an example


@dataclass(frozen=True)
class Examples:
    """Tokenised examples: tokens ends[i - 1] .. ends[i] of the arrays are example i's.

    ids: token ids, the end-of-document token last (where not cut off). trained: the tokens that are a response's.
    form: the kind of the first example, see Template.form. cut, dropped, silent: places of the examples that were cut,
    left out for their length, and left out because no token of their response was left by the cut.
    """

    ids: npt.NDArray[Any]
    trained: npt.NDArray[np.bool_]
    ends: IntArray
    form: str
    read: int
    cut: list[str]
    dropped: list[str]
    silent: list[str]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.ends, prepend=0)

    def of(self, i: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Token ids and `trained` of example i."""
        part = slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))
        return self.ids[part], self.trained[part]


class SegmentEncoder:
    """Segments to token ids. Each is tokenised by itself, so a prompt's last characters and a response's first never
    share a token. Special tokens, the end of a document and markers stay text where a text spells them out.

    A marker that the tokenizer has as an added token becomes that token; else it is tokenised with the text around it.
    Parts that are token ids stay.
    """

    def __init__(self, tokenizer: Tokenizer, control: Sequence[int] = ()) -> None:
        """control: ids of further added tokens that no text may spell. The tokenizer is changed."""
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._markers = {marker.text: added[marker.text] for marker in (IM_START, IM_END) if marker.text in added}
        keep_as_text(tokenizer, (*control, *self._markers.values()))
        self._tokenizer = tokenizer

    def marker_id(self, marker: Marker) -> int | None:
        return self._markers.get(marker.text)

    def encode(self, examples: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Ids of each segment of each example."""
        pieces = [[self._pieces(segment) for segment in segments] for segments in examples]
        texts = [piece for example in pieces for segment in example for piece in segment if isinstance(piece, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        out = []
        for example in pieces:
            ids = [
                [i for piece in segment for i in (next(encoded).ids if isinstance(piece, str) else (piece,))]
                for segment in example
            ]
            out.append(ids)
        return out

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _pieces(self, segment: Segment) -> list[str | int]:
        pieces: list[str | int] = []
        for part in segment.parts:
            piece = self._markers.get(part.text, part.text) if isinstance(part, Marker) else part
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += piece
            elif piece != "":
                pieces.append(piece)
        return pieces


class Encoder(SegmentEncoder):
    """A SegmentEncoder of a tokenizer.json, with the token that ends a document."""

    def __init__(self, tokenizer: Path) -> None:
        self.eos_token, self.eos_id = find_eos(
            tokenizer, remedy="write it as eos_token into a tokenizer_config.json beside it"
        )
        super().__init__(load_tokenizer(str(tokenizer), file_sha256(tokenizer), (self.eos_id,)))


def read_examples(
    files: Sequence[InputFile], template: Template, encoder: Encoder, *, seq_len: int, cut: bool
) -> Examples:
    """Every example of the files. InputError names file and line of one that cannot be used."""
    ids: list[npt.NDArray[Any]] = []
    trained: list[npt.NDArray[np.bool_]] = []
    places: dict[str, list[str]] = {"cut": [], "dropped": [], "silent": []}
    form, read = "", 0
    for batch in _batched(_rendered(files, template, encoder)):
        form = form or batch[0][1]
        read += len(batch)
        for (place, _, segments), parts in zip(batch, encoder.encode([segments for _, _, segments in batch])):
            tokens = np.array([i for part in parts for i in part], dtype=np.int32)
            counts = np.repeat([s.trained for s in segments], [*map(len, parts)])
            if len(tokens) > seq_len:
                places["cut" if cut else "dropped"].append(place)
                if not cut:
                    continue
                tokens, counts = tokens[:seq_len], counts[:seq_len]
                if not counts[1:].any():
                    places["silent"].append(place)
                    continue
            ids.append(tokens)
            trained.append(counts)
    if not ids:
        names = ", ".join(str(file.path) for file in files[:PLACES])
        if not read:
            raise InputError(f"{names}: no example in {'it' if len(files) == 1 else 'them'}; give other data")
        raise InputError(
            f"{names}: no example left of {read:,} ({told(places)}); raise max_seq_len={seq_len}, or give other data"
        )
    ends = np.cumsum([len(part) for part in ids], dtype=np.int64)
    return Examples(np.concatenate(ids), np.concatenate(trained), ends, form, read, **places)


def _rendered(files: Sequence[InputFile], template: Template, encoder: Encoder) -> Iterator[Rendered]:
    """Every example as segments. What is no row of tokens ends with a real end-of-document token, once."""
    context_seen = template.context is None
    for file in files:
        for place, row in read_rows(file):
            context_seen = context_seen or template.context in row
            try:
                if row.get("input_ids") is not None:
                    for segments in token_examples(row):
                        yield place, "tokens", segments
                    continue
                segments = template.segments(row)
                *parts, last = segments[-1].parts
                if isinstance(last, str):
                    last = last.removesuffix(encoder.eos_token)
                    if not last.strip():
                        raise ValueError(f"the response is {encoder.eos_token} alone")
                for segment in segments:
                    if not segment.text.isascii():
                        segment.text.encode()  # a lone surrogate, which JSON can spell, is no text
            except UnicodeEncodeError:
                raise InputError(
                    f"{place}: the text holds half of a surrogate pair, which is not Unicode text; repair or remove it"
                ) from None
            except ValueError as error:
                raise InputError(f"{place}: {error}; repair or remove it") from None
            segments[-1] = Segment((*parts, last, encoder.eos_id), True)
            yield place, template.form(row), segments
    if not context_seen:  # of a single example it may be left out
        raise InputError(f"dataset.fields.context={template.context}: no example has it; name a field that is there")


def _batched(examples: Iterator[Rendered]) -> Iterator[list[Rendered]]:
    batch = []
    for example in examples:
        batch.append(example)
        if len(batch) == ENCODED_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def told(places: dict[str, list[str]]) -> str:
    """What happened to examples that are too long, in words, each kind with its first places."""
    words = {
        "cut": "cut to max_seq_len",
        "dropped": "dropped, longer than max_seq_len",
        "silent": "of these left out, no response left",
    }
    parts = []
    for kind, found in places.items():
        if found:
            more = ", ..." if len(found) > PLACES else ""
            parts.append(f"{len(found):,} {words[kind]} ({', '.join(found[:PLACES])}{more})")
    return "; ".join(parts) or "none too long"
