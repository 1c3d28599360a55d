"""Convert a checkpoint of an MPT: from any form to a Hugging Face folder, or to a Composer .pt file.

FROM is a Hugging Face folder (safetensors or .bin), a name on the Hugging Face hub, a Composer .pt file, or a run's
folder or one of its step-N. TO is a folder, or a file that ends in .pt. Weights only; none of a file's code is run.
"""

import argparse
import sys
import warnings

TOLERANCE = 1e-5  # of the largest logit: the weights are the same numbers before and after


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FROM", help="the checkpoint, or a name on the hub")
    parser.add_argument("to", metavar="TO", help="a folder (an older export there is replaced), or a new .pt file")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are)"
    )
    parser.add_argument(
        "--max-shard-size", type=lambda size: int(size) if size.isdecimal() else size, default="5GB", metavar="SIZE",
        help="of a folder's files: bytes, or such as 500MiB (default: 5GB)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (default: its main branch)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer files to put in (default: the checkpoint's)")
    parser.add_argument(
        "--no-check", action="store_true",
        help="do not load the model before and after to compare its logits, for which it has to fit into memory",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        return _convert(arguments)
    except KeyboardInterrupt:
        print("stopped; what was at TO before is there still", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _convert(arguments: argparse.Namespace) -> int:
    import torch  # here, so that --help does not wait for it

    from mpt.checkpoint import open_checkpoint
    from mpt.convert import convert, logits_difference

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    source = open_checkpoint(arguments.source, revision=arguments.revision, check_hashes=True)
    count = convert(
        source, arguments.to, dtype=dtype, max_shard_size=arguments.max_shard_size, tokenizer=arguments.tokenizer
    )
    what = f"{source.architecture}, {count:,} parameters in {str(dtype or source.dtype).removeprefix('torch.')}"
    files = ", ".join(sorted(source.companions)) if arguments.tokenizer is None else f"those of {arguments.tokenizer}"
    print(f"{source.path} -> {arguments.to}: {what}; tokenizer files: {files or 'none (see --tokenizer)'}")
    if arguments.no_check:
        return 0
    difference = logits_difference(source, arguments.to, dtype=dtype)
    print(f"logits before and after differ by {difference:.1e} of the largest")
    if difference > TOLERANCE:
        print(f"error: that is more than {TOLERANCE}; do not use {arguments.to}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
