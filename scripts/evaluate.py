"""Evaluate a model: its loss on token shards, and lm-eval's tasks.

CHECKPOINT is a Hugging Face folder, a run's folder or one of its step-N, a Composer .pt file, or a name on the hub.
Several processes share the work under torchrun. Exit codes: 0 done, 2 bad input, 130 stopped.
Example: python scripts/evaluate.py runs/mpt-tiny --data data/demo --batch 16
"""

import argparse
import json
import math
import os
import sys
import warnings
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpt import MptForCausalLM
    from trainer.data import TokenBatches
    from trainer.harness import Tasks
    from trainer.parallel import World

# Our packages take seconds to import: inside the functions, so that --help and Ctrl-C are answered from the start.

DATA_OPTIONS = ("seq_len", "max_sequences")
TASK_OPTIONS = ("tasks_path", "num_fewshot", "limit", "max_length")
TIMEOUT_S = 1800.0  # in which the slowest process has read its part of the checkpoint


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint, or a name on the hub")
    parser.add_argument("--data", metavar="DIR", help="a folder of token shards, made by scripts/prepare_data.py")
    parser.add_argument("--split", default="val", help="of --data (default: val)")
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens of a sequence (default: the model's max_seq_len)"
    )
    parser.add_argument("--max-sequences", type=_positive, metavar="N", help="only the split's first N")
    parser.add_argument(
        "--tasks", type=_names, metavar="NAME,...", help="lm-eval's tasks, groups or tags; * matches many"
    )
    parser.add_argument("--tasks-path", metavar="DIR", help="a folder with task files of your own")
    parser.add_argument(
        "--num-fewshot", type=_count, metavar="N", help="examples before a question (default: the task's)"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only each task's first N questions")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens that a task may have the model read (default: max_seq_len)"
    )
    parser.add_argument(
        "--batch", type=_positive, metavar="N", help="sequences of a forward (default: about 8192 tokens)"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="file, folder or hub name (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (default: its main branch)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: theirs)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    args = parser.parse_args(argv)
    if args.data is None and args.tasks is None:
        parser.error("nothing to evaluate on; give --data DIR, --tasks NAME,..., or both")
    for needed, options in (("data", DATA_OPTIONS), ("tasks", TASK_OPTIONS)):
        for name in options:
            if getattr(args, needed) is None and getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} needs --{needed}")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("no names")
    return names


class _Told(Exception):
    """Bad input of which another process tells."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return _run(args)
    except _Told:
        return 2
    except ValueError as error:  # InputError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from trainer.errors import InputError
    from trainer.parallel import FsdpConfig, is_main, join_world

    if is_main():
        warnings.showwarning = lambda text, *_: print(f"warning: {text}", file=sys.stderr)
    else:
        warnings.simplefilter("ignore")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    with join_world(args.device, FsdpConfig(), timeout_s=TIMEOUT_S) as world:
        try:
            results = _evaluate(args, world)
        except RuntimeError as error:
            raise _out_of_memory(error, args) from None
    _save(args, world, results)
    return 0


def _evaluate(args: argparse.Namespace, world: "World") -> dict[str, Any]:
    import torch

    from mpt.checkpoint import open_checkpoint
    from trainer.evaluate import load_model, open_shards, tokenizer_files
    from trainer.harness import find_tasks

    error: Exception | None = None
    try:
        tasks = None if args.tasks is None else find_tasks(args.tasks, args.tasks_path)
        source = open_checkpoint(args.checkpoint, revision=args.revision, check_hashes=True)
        files, config, data = tokenizer_files(source, args.tokenizer), source.config(), None
        if args.data is not None:
            tokenizer = files.get("tokenizer.json")
            data = open_shards(args.data, config, tokenizer, split=args.split, seq_len=args.seq_len)
            if tokenizer is None and world.rank == 0:
                print(f"note: {args.checkpoint} has no tokenizer.json to compare with the shards'", file=sys.stderr)
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        # Of generation the processes do not take equally many steps: there each needs weights of its own.
        model = load_model(source, world, dtype, whole=args.tasks is not None)
    except ValueError as e:
        error = e
    _agree(world, error)
    results: dict[str, Any] = {}
    if data is not None:
        results["data"] = _on_shards(args, world, model, data)
    if tasks is not None:
        if data is not None:
            _save(args, world, results)  # the tasks may fail
        results["tasks"] = _on_tasks(args, world, model, files, tasks)
    return results


def _agree(world: "World", error: Exception | None) -> None:
    """Raise on every rank where there is an error on any; rank 0 tells it."""
    try:
        world.agree(error)
    except ValueError as told:
        raise told if world.rank == 0 else _Told from None


def _on_shards(
    args: argparse.Namespace, world: "World", model: "MptForCausalLM", data: "TokenBatches"
) -> dict[str, Any]:
    from trainer.data.workers import Progress
    from trainer.evaluate import TOKENS_PER_BATCH, mean_loss, token_bytes

    sequences = min(args.max_sequences or data.sequences, data.sequences)
    batch_size = min(args.batch or max(TOKENS_PER_BATCH // data.seq_len, 1), sequences)
    with Progress("evaluate", sequences, world.rank != 0) as progress:
        found = mean_loss(
            model, data, world, batch_size=batch_size, sequences=sequences,
            token_bytes=token_bytes(data, model.config.vocab_size), advance=progress.advance,
        )  # fmt: skip
    shards = data.sources[0].shards
    results = {
        "folder": str(shards.manifest.folder),
        "split": shards.split,
        "seq_len": data.seq_len,
        "sequences": sequences,
        "tokens": found.tokens,
        "tokens_not_read": shards.tokens - sequences * data.seq_len,
        "text_bytes": found.text_bytes,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens_per_s": found.tokens_per_s,
    }
    if world.rank == 0:
        print(_report(results), flush=True)
    return results


def _report(results: dict[str, Any]) -> str:
    lines = [
        f"{results['folder']}, split {results['split']}",
        f"{'loss':<15}{results['loss']:.6f} nats per token",
        f"{'perplexity':<15}{results['perplexity']:,.4f}",
        f"{'bits per byte':<15}{results['bits_per_byte']:.6f}" if results["bits_per_byte"] is not None else None,
        f"{'tokens':<15}{results['tokens']:,} predicted, in {results['sequences']:,} sequences of "
        f"{results['seq_len']:,}; {results['tokens_not_read']:,} of the split not read",
        f"{'speed':<15}{results['tokens_per_s']:,.0f} tokens/s",
    ]
    return "\n".join(line for line in lines if line is not None)


def _on_tasks(
    args: argparse.Namespace, world: "World", model: "MptForCausalLM", files: dict[str, bytes], tasks: "Tasks"
) -> dict[str, Any]:
    from trainer.harness import TextModel, run_tasks, table

    error: Exception | None = None
    try:
        text_model = TextModel(
            model, files, max_length=args.max_length, batch_size=args.batch, quiet=world.rank != 0, world=world
        )
        results = run_tasks(text_model, tasks, num_fewshot=args.num_fewshot, limit=args.limit)
    except ValueError as e:
        error = e
    _agree(world, error)
    if world.rank != 0:
        return {}
    print(table(results), flush=True)
    return {name: results[name] for name in ("results", "groups", "versions", "n-shot", "n-samples") if name in results}


def _out_of_memory(error: RuntimeError, args: argparse.Namespace) -> Exception:
    """The error, or, where memory ran out, one that says what would help."""
    import torch

    from trainer.errors import InputError

    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
        return error
    advice = [] if args.batch == 1 else [f"--batch {args.batch // 2}" if args.batch else "--batch 1"]
    advice += ["--dtype bfloat16"] if args.dtype is None else []
    advice += ["a shorter --max-length"] if args.tasks else ["a shorter --seq-len", "several processes under torchrun"]
    return InputError(f"out of memory ({str(error).splitlines()[0]}); what would help: {'; '.join(advice)}")


def _save(args: argparse.Namespace, world: "World", results: dict[str, Any]) -> None:
    """Write the file of --json, where there is to be one."""
    from trainer.errors import InputError

    path: Path | None = args.json
    if world.rank != 0 or path is None:
        return
    try:
        found = _plain({"checkpoint": args.checkpoint, **results})
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {path} cannot be written ({error.strerror}); the results are above") from None


def _plain(value: Any) -> Any:
    """JSON's own types: what is not finite is null, what is no number or text the text that Python has for it."""
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Integral):
        return value if isinstance(value, bool) else int(value)
    return value if value is None else str(value)


if __name__ == "__main__":
    # In the place of this file's folder, which has a module of the name of Hugging Face's `evaluate`.
    sys.path[0] = str(Path(__file__).parent.parent)
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from trainer.parallel import leave

        leave(code)
    sys.exit(code)
