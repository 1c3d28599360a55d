"""Turning documents into token shards: in parallel, resumable, and with the same result for any number of workers.

The inputs are cut into parts by their sizes alone. Workers tokenise parts into files under OUT/.prepare, each with a
record of what it was made from; then consecutive parts are joined into shards, and the manifest is written last. A
run that was interrupted keeps every part and shard whose inputs and options are unchanged.

A document's ids are followed by one EOS. Special tokens that a document's text happens to spell are tokenised as
ordinary text. A document goes to validation when a hash of its content and the seed falls below the fraction, so the
split does not depend on the order or number of files, and exact duplicates never lie on both sides.

With excerpt_tokens, documents are cut into excerpts of that many tokens as they are written: a part, and so a shard,
then holds whole excerpts only, and sequences of a length that divides theirs never reach into another document.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainer.data.encode import Cutter, Encoding, Excerpts, Rest, encode, load_tokenizer
from trainer.data.shards import DTYPES, FORMAT, MANIFEST, STATE, VERSION, ShardSet, read_manifest
from trainer.data.sources import InputFile, Piece, Reading, cut_files, list_files
from trainer.data.tokenizer import TOKENIZER, file_sha256, find_eos, find_tokenizer, settings_files
from trainer.data.workers import Progress, run_jobs
from trainer.errors import InputError

SPLITS = ("train", "val")
MIN_PART_BYTES, MAX_PART_BYTES = 1 << 20, 1 << 26
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class PrepareOptions:
    """What scripts/prepare_data.py was asked for. `val_inputs` go to validation whole, `inputs` by `val_fraction`."""

    inputs: tuple[str, ...]
    out: str
    tokenizer: str
    val_inputs: tuple[str, ...] = ()
    text_field: str = "text"
    val_fraction: float = 0.005
    workers: int = 1
    seed: int = 17
    eos: str | None = None
    dtype: str = "auto"
    shard_tokens: int = 1 << 27
    document_unit: str = "file"
    mds_dtype: str = "int64"
    excerpt_tokens: int | None = None
    rest: Rest | None = None
    min_tokens: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class _Part:
    number: int
    pieces: tuple[Piece, ...]
    encoding: Encoding
    state: str
    key: str

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def record(self) -> Path:
        return Path(self.state) / f"part-{self.number:05d}.json"

    def tokens_file(self, split: str) -> Path:
        return Path(self.state) / f"part-{self.number:05d}-{split}.bin"


@dataclass(frozen=True)
class _Join:
    """One shard to be: the parts' files to join, their keys, and where the result goes."""

    split: str
    number: int
    parts: tuple[int, ...]
    keys: tuple[str, ...]
    files: tuple[str, ...]
    out: str
    dtype: str
    eos_id: int
    excerpt_tokens: int | None

    @property
    def file(self) -> str:
        return f"{self.split}/shard-{self.number:05d}.bin"

    def record(self) -> Path:
        return Path(self.out) / STATE / f"shard-{self.split}-{self.number:05d}.json"


def prepare(options: PrepareOptions, quiet: bool = False) -> dict[str, Any]:
    """Makes OUT's shards and manifest, and returns the manifest; InputError for what cannot be used.

    An unchanged, finished OUT is left as it is. Interrupted at any point, the same call goes on where it was.
    """
    _check(options)
    encoding, eos = _encoding(options)
    out, state = Path(options.out), Path(options.out) / STATE
    parts = _plan(options, encoding, str(state))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made ({error.strerror}); choose another folder") from None
    key = _digest([[part.key for part in parts], options.shard_tokens])
    with _locked(out):
        found = _finished(options, key)
        if not options.overwrite and not (out / MANIFEST).exists() and not state.exists():
            _refuse_foreign(out, encoding)
        if found is not None:
            Progress.say(quiet, f"{out}: up to date, {_summary(found)}")
            return found
        state.mkdir(exist_ok=True)
        with _nothing_left_of_nothing(out):
            joined = _joined(parts, options)
            todo = [part for part in parts if not _part_done(part, joined)]
            if len(todo) < len(parts):
                Progress.say(quiet, f"{out}: {len(parts) - len(todo)} of {len(parts)} parts are there already")
            with Progress("tokenise", sum(part.size for part in todo), quiet) as progress:
                run_jobs(_tokenise, todo, options.workers, lambda part, n: progress.advance(part.size, n))
            manifest = _join_all(parts, options, encoding, quiet)
        manifest |= {"source": {"key": key, "eos": eos, **_source(options)}}
        if encoding.excerpts is not None:
            manifest["source"]["left_out"] = _left_out(parts)
        _finish(out, manifest, encoding)
    Progress.say(quiet, f"{out}: {_summary(manifest)}; {progress.rate()}")
    if not manifest["splits"]["val"] and (options.val_fraction or options.val_inputs):
        short = "" if encoding.excerpts is None else " that is long enough"
        Progress.say(quiet, f"warning: no document{short} fell into validation; raise --val-fraction "
                     f"{options.val_fraction}, cut text files into more documents with --documents, or give --val "
                     "INPUT")  # fmt: skip
    return manifest


def _check(options: PrepareOptions) -> None:
    if not 0 <= options.val_fraction < 1:
        raise InputError(f"--val-fraction {options.val_fraction}: give a fraction of the documents, 0 <= fraction < 1")
    for name, value in (("--workers", options.workers), ("--shard-tokens", options.shard_tokens)):
        if value < 1:
            raise InputError(f"{name} {value}: give 1 or more")
    for name in (options.out, *options.inputs, *options.val_inputs):
        if "://" in name:
            raise InputError(f"{name}: remote files and folders are not supported yet; give a local one")
    for name in (*options.inputs, *options.val_inputs):
        if Path(name).is_dir() and Path(options.out).resolve().is_relative_to(Path(name).resolve()):
            raise InputError(f"--out {options.out}: lies inside the input folder {name}; choose a folder outside it")
    if options.excerpt_tokens is None:
        for name, given in (("--rest", options.rest), ("--min-tokens", options.min_tokens)):
            if given is not None:
                raise InputError(f"{name} {given} is for excerpts; give --excerpt-tokens as well")
    elif options.excerpt_tokens < 2:
        raise InputError(f"--excerpt-tokens {options.excerpt_tokens}: give the max_seq_len to train with, at least 2")
    elif options.min_tokens is not None and not 1 <= options.min_tokens <= options.excerpt_tokens:
        raise InputError(
            f"--min-tokens {options.min_tokens}: give 1 to {options.excerpt_tokens}, the tokens of an excerpt"
        )
    if not 0 <= options.seed < 2**64:
        raise InputError(f"--seed {options.seed}: give a number from 0 to 2**64 - 1")


def _encoding(options: PrepareOptions) -> tuple[Encoding, str]:
    path = find_tokenizer(options.tokenizer)
    eos, eos_id = find_eos(path, options.eos)
    vocab_size = max(load_tokenizer(str(path), file_sha256(path), (eos_id,)).get_vocab().values()) + 1
    dtype = options.dtype
    if dtype == "auto":
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    if vocab_size - 1 > np.iinfo(DTYPES[dtype]).max:
        raise InputError(f"--dtype {dtype}: the tokenizer's largest id is {vocab_size - 1}; use --dtype uint32 or auto")
    encoding = Encoding(
        tokenizer=str(path), tokenizer_sha256=file_sha256(path), vocab_size=vocab_size, eos_id=eos_id, dtype=dtype,
        val_fraction=options.val_fraction, seed=options.seed,
        reading=Reading(options.text_field, options.document_unit, options.mds_dtype), excerpts=_excerpts(options),
    )  # fmt: skip
    return encoding, eos


def _excerpts(options: PrepareOptions) -> Excerpts | None:
    if options.excerpt_tokens is None:
        return None
    least = options.min_tokens if options.min_tokens is not None else max(1, options.excerpt_tokens // 4)
    return Excerpts(options.excerpt_tokens, options.rest or "overlap", least)


def _plan(options: PrepareOptions, encoding: Encoding, state: str) -> list[_Part]:
    """The parts: consecutive pieces of one split up to a size that depends on the total only."""
    files, val_files = list_files(list(options.inputs)), list_files(list(options.val_inputs))
    limit = _part_bytes(files + val_files)
    pieces = [*cut_files(files, False, limit), *cut_files(val_files, True, limit)]
    groups: list[list[Piece]] = []
    for piece in pieces:
        last = groups[-1] if groups else None
        joins = last and last[0].validation == piece.validation and sum(p.size for p in last) + piece.size <= limit
        if last is not None and joins:
            last.append(piece)
        else:
            groups.append([piece])
    settings = {name: value for name, value in asdict(encoding).items() if name != "tokenizer" and value is not None}
    return [
        _Part(number, tuple(group), encoding, state, _digest([settings, [piece.state() for piece in group]]))
        for number, group in enumerate(groups)
    ]


def _part_bytes(files: list[InputFile]) -> int:
    """A 64th of everything, as a power of two from 1 to 64 MiB: enough parts to share out, few enough to join."""
    target = sum(file.size for file in files) // 64
    return min(MAX_PART_BYTES, max(MIN_PART_BYTES, 1 << max(0, target.bit_length() - 1)))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{out}: another preparation is writing there; wait for it, or choose another --out"
            ) from None
        yield
    finally:
        os.close(folder)


@contextmanager
def _nothing_left_of_nothing(out: Path) -> Iterator[None]:
    """Where work fails before there are any tokens to keep, remove the state, and OUT if it is empty then."""
    try:
        yield
    except InputError:
        if not any((out / STATE).glob("part-*.bin")) and not any((out / STATE).glob("shard-*.json")):
            shutil.rmtree(out / STATE)
            with suppress(OSError):
                out.rmdir()
        raise


def _finished(options: PrepareOptions, key: str) -> dict[str, Any] | None:
    """The manifest of a finished run of the same plan, or None where there is work to do."""
    out = Path(options.out)
    path = out / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = read_manifest(out)
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["source"]["key"] == key:
            for split in (name for name, shards in manifest.splits.items() if shards):
                ShardSet(out, split)
            return data
    except (InputError, KeyError, TypeError) as error:
        if not options.overwrite:
            raise InputError(
                f"{out}: the shards there cannot be kept ({error}); give --overwrite to make them anew"
            ) from None
    if not options.overwrite:
        raise InputError(
            f"{out}: holds shards made from other inputs or with other options; choose another --out, "
            "or give --overwrite to replace them"
        )
    return None


def _refuse_foreign(out: Path, encoding: Encoding) -> None:
    """InputError where OUT, in which no preparation of ours was begun, holds files that it would replace or delete."""
    foreign = [path for split in SPLITS for path in _shard_files(out, split)]
    for file, name in _copies(encoding):
        if (out / name).exists() and file_sha256(out / name) != file_sha256(file):
            foreign.append(out / name)
    if foreign:
        raise InputError(
            f"--out {out}: holds {', '.join(str(path.relative_to(out)) for path in foreign[:3])} of something else; "
            "choose another folder, or give --overwrite to replace what is there"
        )


def _shard_files(out: Path, split: str) -> list[Path]:
    return sorted((out / split).glob("shard-[0-9]*.bin"))


def _copies(encoding: Encoding) -> list[tuple[Path, str]]:
    """The tokenizer's files, and their names in OUT."""
    source = Path(encoding.tokenizer)
    return [(source, TOKENIZER), *((file, file.name) for file in settings_files(source))]


def _part_done(part: _Part, joined: set[tuple[str, int]]) -> bool:
    record = _read_record(part.record(), part.key)
    if record is None:
        return False
    itemsize = DTYPES[part.encoding.dtype].itemsize
    for split in SPLITS:
        tokens = record["tokens"][split]
        file = part.tokens_file(split)
        size = file.stat().st_size if file.is_file() else -1
        if tokens and size != tokens * itemsize and (split, part.number) not in joined:
            return False
    return True


def _read_record(path: Path, key: object) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record if record["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _joined(parts: list[_Part], options: PrepareOptions) -> set[tuple[str, int]]:
    """(split, part) of the parts that an interrupted run has joined into shards which are still good."""
    if any(_read_record(part.record(), part.key) is None for part in parts):
        return set()
    done = [join for join in _joins(parts, options) if _join_done(join) is not None]
    return {(join.split, number) for join in done for number in join.parts}


def _joins(parts: list[_Part], options: PrepareOptions) -> list[_Join]:
    """Consecutive parts up to `shard_tokens` each, per split; a single larger part makes a larger shard."""
    joins: list[_Join] = []
    for split in SPLITS:
        groups: list[list[_Part]] = []
        room = 0
        for part in parts:
            record = _read_record(part.record(), part.key)
            assert record is not None
            tokens = record["tokens"][split]
            if tokens == 0:
                continue
            if tokens > room:
                groups.append([])
                room = options.shard_tokens
            groups[-1].append(part)
            room -= tokens
        for number, group in enumerate(groups):
            joins.append(
                _Join(
                    split, number, tuple(part.number for part in group), tuple(part.key for part in group),
                    tuple(str(part.tokens_file(split)) for part in group), options.out,
                    group[0].encoding.dtype, group[0].encoding.eos_id, options.excerpt_tokens,
                )
            )  # fmt: skip
    return joins


def _join_done(join: _Join) -> dict[str, Any] | None:
    record = _read_record(join.record(), list(join.keys))
    target = Path(join.out) / join.file
    if record is not None and target.is_file() and target.stat().st_size == record["shard"]["bytes"]:
        shard: dict[str, Any] = record["shard"]
        return shard
    return None


def _join_all(parts: list[_Part], options: PrepareOptions, encoding: Encoding, quiet: bool) -> dict[str, Any]:
    joins = _joins(parts, options)
    if not any(join.split == "train" for join in joins):
        only_text = all(file.kind == "text" for file in list_files(list(options.inputs)))
        remedy = "all of it is empty, or fell into validation" if only_text else "check --text-field and the files"
        if (cut := encoding.excerpts) is not None and (left_out := _left_out(parts)["documents"]):
            other = f"--min-tokens {cut.min_tokens}" if cut.rest == "pad" else "give --rest pad"
            remedy = f"{left_out} too short for --excerpt-tokens {cut.tokens}; lower it, or {other}"
        raise InputError(f"{', '.join(options.inputs)}: no document for training in it; {remedy}")
    (Path(options.out) / MANIFEST).unlink(missing_ok=True)  # of shards that are replaced from here on
    for split in SPLITS:
        (Path(options.out) / split).mkdir(exist_ok=True)
    todo = [join for join in joins if _join_done(join) is None]
    with Progress("join", len(todo), quiet) as progress:
        run_jobs(_join_parts, todo, options.workers, lambda join, _: progress.advance(1))
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for join in joins:
        shard = _join_done(join)
        if shard is None:
            raise InputError(f"{options.out}/{join.file}: vanished while it was made; run the command again")
        splits[join.split].append(shard)
    return {
        "format": FORMAT, "version": VERSION, "dtype": encoding.dtype, "eos_id": encoding.eos_id,
        "tokenizer": {"sha256": encoding.tokenizer_sha256, "file": TOKENIZER, "vocab_size": encoding.vocab_size},
        "splits": splits,
        **({} if encoding.excerpts is None else {"excerpt_tokens": encoding.excerpts.tokens}),
    }  # fmt: skip


def _left_out(parts: list[_Part]) -> dict[str, int]:
    """Documents and tokens that excerpts left out, in all parts."""
    records = [json.loads(part.record().read_text(encoding="utf-8")) for part in parts]
    return {name: sum(record["left_out"][name] for record in records) for name in ("documents", "tokens")}


def _finish(out: Path, manifest: dict[str, Any], encoding: Encoding) -> None:
    """Copies the tokenizer, writes the manifest, and removes what earlier, different runs left."""
    for file, name in _copies(encoding):
        if not (out / name).exists() or not file.samefile(out / name):
            shutil.copyfile(file, out / name)
    _write_json(out / MANIFEST, manifest)
    named = {shard["file"] for shards in manifest["splits"].values() for shard in shards}
    for split in SPLITS:
        for path in _shard_files(out, split):
            if f"{split}/{path.name}" not in named:
                path.unlink()
    shutil.rmtree(out / STATE)


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _source(options: PrepareOptions) -> dict[str, Any]:
    kept = ["inputs", "val_inputs", "tokenizer", "text_field", "val_fraction", "seed", "document_unit", "mds_dtype"]
    values = {name: value for name, value in asdict(options).items() if name in kept}
    if (cut := _excerpts(options)) is not None:
        values |= {"excerpt_tokens": cut.tokens, "rest": cut.rest, "min_tokens": cut.min_tokens}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _summary(manifest: dict[str, Any]) -> str:
    counts, unit = [], "documents" if "excerpt_tokens" not in manifest else "excerpts"
    for split, shards in manifest["splits"].items():
        tokens, documents = (sum(shard[name] for shard in shards) for name in ("tokens", "documents"))
        counts.append(f"{split} {tokens:,} tokens, {documents:,} {unit}, {len(shards):,} shards")
    if (left_out := manifest["source"].get("left_out")) is not None:
        counts.append(f"left out {left_out['tokens']:,} tokens, {left_out['documents']:,} whole documents")
    return "; ".join(counts)


# What runs in the workers


def _tokenise(part: _Part) -> int:
    """Writes the part's token files and record, and returns its number of tokens."""
    tokens = dict.fromkeys(SPLITS, 0)
    excerpts = part.encoding.excerpts
    cutter = None if excerpts is None else Cutter(excerpts, part.encoding.eos_id)
    files: dict[str, IO[bytes]] = {}
    temporary = {split: part.tokens_file(split).with_suffix(".tmp") for split in SPLITS}
    try:
        for split in SPLITS:
            files[split] = open(temporary[split], "wb", buffering=1 << 20)  # noqa: SIM115
        runs = encode(part.pieces, part.encoding)
        for split, ids in runs if cutter is None else cutter(runs):
            files[split].write(ids.astype(DTYPES[part.encoding.dtype], copy=False).tobytes())
            tokens[split] += len(ids)
    finally:
        for file in files.values():
            file.close()
    for split in SPLITS:
        if tokens[split]:
            os.replace(temporary[split], part.tokens_file(split))
        else:
            temporary[split].unlink()
    record: dict[str, Any] = {"key": part.key, "tokens": tokens}
    if cutter is not None:
        record["left_out"] = {"documents": cutter.documents_left_out, "tokens": cutter.tokens_left_out}
    _write_json(part.record(), record)
    return sum(tokens.values())


def _join_parts(join: _Join) -> int:
    """Writes a shard and its record, then removes the parts' files; returns its number of tokens."""
    target = Path(join.out) / join.file
    temporary = target.with_suffix(".tmp")
    dtype = DTYPES[join.dtype]
    digest = hashlib.sha256()
    tokens = documents = max_id = 0
    with open(temporary, "wb") as out:
        for name in join.files:
            with open(name, "rb") as file:
                while data := file.read(COPY_BYTES):
                    ids = np.frombuffer(data, dtype)
                    digest.update(data)
                    out.write(data)
                    tokens += len(ids)
                    documents += int(np.count_nonzero(ids == join.eos_id))
                    max_id = max(max_id, int(ids.max()))
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, target)
    if join.excerpt_tokens is not None:
        documents = tokens // join.excerpt_tokens
    shard = {"file": join.file, "tokens": tokens, "documents": documents, "max_id": max_id,
             "bytes": tokens * dtype.itemsize, "sha256": digest.hexdigest()}  # fmt: skip
    _write_json(join.record(), {"key": list(join.keys), "shard": shard})
    for name in join.files:
        os.unlink(name)
    return tokens
