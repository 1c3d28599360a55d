"""Prepare token shards for training from text: JSON lines, Parquet, text, MDS folders or a hub data set."""

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from trainer.data.prepare import PrepareOptions

# Our packages take seconds to import: inside the functions, so that Ctrl-C is answered in a line from the start.


def parse(argv: list[str] | None = None) -> "PrepareOptions":
    from trainer.data.encode import Rest
    from trainer.data.mds import TOKEN_DTYPES
    from trainer.data.prepare import PrepareOptions
    from trainer.data.sources import DOCUMENT_UNITS

    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Interrupted, the same command goes on where it stopped. The result does not depend on --workers.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="files (.jsonl .parquet .arrow .txt, plain, .gz or .zst), MDS folders, folders or quoted globs of these, "
        "or a hub data set NAME[:CONFIG][@SPLIT]",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards and manifest.json")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json, a folder with one, or a hub name")
    parser.add_argument("--text-field", default="text", help="the field or column that holds the text (default: text)")
    parser.add_argument(
        "--val-fraction", type=float, default=None,
        help="share of the documents for validation (default: 0.005, or 0 with --val)",
    )  # fmt: skip
    parser.add_argument("--val", nargs="+", default=[], metavar="INPUT", help="inputs that go to validation whole")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    parser.add_argument("--seed", type=int, default=17, help="decides which documents are validation (default: 17)")
    parser.add_argument("--eos", help="the token that ends a document (default: the tokenizer's, or <|endoftext|>)")
    parser.add_argument("--dtype", choices=("auto", "uint16", "uint32"), default="auto", help="of the ids on disk")
    parser.add_argument("--shard-tokens", type=int, default=1 << 27, help="tokens of a shard at most (default: 2**27)")
    parser.add_argument(
        "--documents", choices=DOCUMENT_UNITS, default="file",
        help="what a document is in a text file: the whole file, a paragraph (to a blank line) or a line",
    )  # fmt: skip
    parser.add_argument(
        "--mds-dtype", choices=TOKEN_DTYPES, default="int64", help="integers of MDS columns `tokens` stored as bytes"
    )
    parser.add_argument(
        "--excerpt-tokens", type=int, metavar="N",
        help="cut documents, such as books, into excerpts of N tokens that none leaves: your max_seq_len",
    )  # fmt: skip
    parser.add_argument(
        "--rest", choices=get_args(Rest),
        help="with --excerpt-tokens, a document's last tokens: an excerpt that begins inside the one before it (the "
        "default), one that is filled up, or left out",
    )  # fmt: skip
    parser.add_argument(
        "--min-tokens", type=int, metavar="M", help="with --excerpt-tokens, leave shorter rests out (default: N / 4)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace finished shards of other inputs or options")
    args = parser.parse_args(argv)
    val_fraction = args.val_fraction
    if val_fraction is None:
        val_fraction = 0.0 if args.val else 0.005
    return PrepareOptions(
        inputs=tuple(args.inputs), out=args.out, tokenizer=args.tokenizer, val_inputs=tuple(args.val),
        text_field=args.text_field, val_fraction=val_fraction, workers=args.workers, seed=args.seed, eos=args.eos,
        dtype=args.dtype, shard_tokens=args.shard_tokens, document_unit=args.documents, mds_dtype=args.mds_dtype,
        excerpt_tokens=args.excerpt_tokens, rest=args.rest, min_tokens=args.min_tokens, overwrite=args.overwrite,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped the same way as by Ctrl-C
    try:
        return _prepare(argv)
    except KeyboardInterrupt:
        print("stopped; what is done is kept, run the same command again to go on", file=sys.stderr)
        return 130


def _prepare(argv: list[str] | None) -> int:
    options = parse(argv)
    from trainer.data.prepare import prepare
    from trainer.errors import InputError

    try:
        prepare(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; what is done is kept, run the same command again to go on", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
