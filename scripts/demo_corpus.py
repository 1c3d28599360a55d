"""Make the demo's data from what every machine has: Python's standard library, and a BPE tokenizer trained on it."""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.prepare import PrepareOptions, prepare
from trainer.data.tokenizer import DEFAULT_EOS, TOKENIZER
from trainer.errors import InputError

LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
CORPUS_BYTES = 8_000_000
VOCAB_SIZE = 4096
VAL_BYTES = 350_000  # about 100,000 tokens


def source_files(root: Path) -> Iterator[str]:
    """Names relative to root, with `/`, of the .py files in it that belong to the corpus."""
    for folder, folders, files in os.walk(root):
        # _sysconfigdata and config-* describe the build, so they differ between machines with the same Python.
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def standard_library() -> list[tuple[str, str]]:
    """(name, text) of the library's .py files, sorted by name, until their text reaches CORPUS_BYTES of UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    documents: list[tuple[str, str]] = []
    total = 0
    for name in sorted(source_files(root)):
        data = (root / name).read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        documents.append((name, text))
        total += len(data)
        if total >= CORPUS_BYTES:
            return documents
    if not documents:
        raise InputError(f"{root}: no .py files of the standard library; install Python with its library's source")
    return documents


def split(documents: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, validation), both in the given order; files go to validation by the hash of their names.

    A fraction of the documents would do for a large corpus. Here a few hundred files of very different lengths would
    make it a third or three times of what is wanted, depending on the version of Python. The code page tables of
    `encodings` stay in training: they are copies of one another, and would make the validation loss look better.
    """
    chosen: set[str] = set()
    total = 0
    for name, text in sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest()):
        if total + len(text) <= VAL_BYTES and not name.startswith("encodings/"):
            chosen.add(name)
            total += len(text)
    return [d for d in documents if d[0] not in chosen], [d for d in documents if d[0] in chosen]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE entries, `<|endoftext|>` being 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[DEFAULT_EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_if_changed(path: Path, text: str) -> None:
    """Leaves an equal file alone, so that shards made from it stay up to date."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def make_demo(out: Path, workers: int) -> None:
    """Writes OUT/{corpus,validation}.jsonl, the tokenizer, the shards and their manifest; equal files are kept."""
    out.mkdir(parents=True, exist_ok=True)
    documents = standard_library()
    files = [out / "corpus.jsonl", out / "validation.jsonl"]
    for path, part in zip(files, split(documents)):
        lines = (json.dumps({"text": text, "file": name}, ensure_ascii=False) + "\n" for name, text in part)
        write_if_changed(path, "".join(lines))
    tokenizer = train_tokenizer([text for _, text in documents])
    write_if_changed(out / TOKENIZER, tokenizer.to_str(pretty=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": DEFAULT_EOS}
    write_if_changed(out / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
    options = PrepareOptions(
        inputs=(str(files[0]),), val_inputs=(str(files[1]),), out=str(out), tokenizer=str(out), val_fraction=0.0,
        workers=workers, overwrite=True,
    )  # fmt: skip
    prepare(options)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/demo", metavar="DIR", help="where to put it (default: data/demo)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    args = parser.parse_args(argv)
    try:
        make_demo(Path(args.out), args.workers)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
