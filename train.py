"""Train an MPT: `train.py RECIPE [key=value ...] [--check] [--deep]`, alone or under torchrun."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from trainer.config import TrainConfig

USAGE = "train.py RECIPE [key=value ...] [--check [--deep] [--world-size N]]"
HELP = """\
  RECIPE          a YAML file, ours (see yaml/) or one of llm-foundry's for pretraining
  key=value       overrides one of its keys: optimizer.lr=1e-4 model.n_layers=4 'optimizer.betas=[0.9,0.95]'

Run it again to go on with a run that was stopped. Under torchrun: torchrun --nproc-per-node 8 train.py RECIPE
exit codes: 0 done, 2 bad input, 3 stopped at a non-finite loss, 130 or 143 stopped by a signal after saving"""

BAD_INPUT, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Arguments:
    """The command line. world_size: number of processes to plan for; other than torchrun's only with --check."""

    recipe: str
    overrides: list[str]
    check: bool
    deep: bool
    world_size: int


class UsageError(Exception):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\nusage: {USAGE}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    except UsageError as e:
        return _report(e)
    try:
        return _train(arguments)
    except KeyboardInterrupt:
        # In the loop a signal saves first; here there is nothing newer than the last checkpoint.
        if _environment("RANK", 0) == 0:
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED


def _train(arguments: Arguments) -> int:
    from trainer.config import load_config  # here, so that --help does not wait for torch
    from trainer.errors import InputError

    try:
        config = load_config(arguments.recipe, arguments.overrides)
        if arguments.check:
            if _environment("RANK", 0) == 0:
                check(config, arguments.world_size, deep=arguments.deep)
            return 0
        from trainer.run import run

        return run(config)
    except InputError as e:
        return _report(e)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The command line as Arguments; raises UsageError, and SystemExit for --help."""
    parser = _Parser(
        prog="train.py",
        usage=USAGE,
        description="Train an MPT.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="check everything, print the plan, and do not train")
    parser.add_argument("--deep", action="store_true", help="with --check: also hash and scan every token shard")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --check: plan for N processes")
    known, unknown = parser.parse_known_intermixed_args(argv)
    for argument in unknown:
        if "=" in argument:
            parser.error(f"{argument}: settings have no dashes; write {argument.lstrip('-')}")
        parser.error(f"unknown option {argument}; settings are written key=value")
    if known.recipe is None:  # argparse, asked to require it, would name the settings as well
        parser.error("a RECIPE is required, such as yaml/mpt-tiny.yaml")
    if not known.check and (known.deep or known.world_size is not None):
        parser.error(f"{'--deep' if known.deep else '--world-size'} needs --check")
    started, rank = _environment("WORLD_SIZE", 1), _environment("RANK", 0)
    if not 0 <= rank < started:
        raise UsageError(f"environment RANK={rank} with WORLD_SIZE={started}: start several processes with torchrun")
    world_size = started if known.world_size is None else known.world_size
    if world_size < 1:
        parser.error(f"--world-size {world_size}: give at least 1")
    return Arguments(known.recipe, known.overrides, known.check, known.deep, world_size)


def check(config: "TrainConfig", world_size: int, *, deep: bool) -> None:
    """Validate a run; print its plan and data. deep: also hash and scan every token shard and the checkpoint to load.

    Raises InputError for what the run would stumble over.
    """
    from trainer.checkpoint import is_own, verify
    from trainer.config import validate
    from trainer.data import TokenBatches, scan
    from trainer.errors import InputError
    from trainer.plan import plan

    try:
        resolved = validate(config, world_size)
    except InputError:
        with contextlib.suppress(InputError):  # the plan needs no data: worth having before there is any
            print(plan(config, validate(config, world_size, open_data=False), world_size), flush=True)
        raise
    print(plan(config, resolved, world_size))
    for name, data in (("train_loader", resolved.train_data), ("eval_loader", resolved.eval_data)):
        if data is None:
            continue
        for line in data.description().splitlines():
            print(f"{name:<14}{line}")
        sources = data.sources if deep and isinstance(data, TokenBatches) else []
        for shards in (source.shards for source in sources):
            scan(shards.manifest.folder, shards.split, resolved.model_config.vocab_size)
            print(f"{'':<14}{shards.manifest.folder} {shards.split}: every hash and id is right")
    if config.load_path is not None:
        ours = is_own(config.load_path)
        if deep and ours:
            verify(config.load_path)
        hashes = ", hashes too" if deep and ours else ""
        print(f"{'load_path':<14}{config.load_path}: names and shapes are right{hashes}")
    print("all is well; nothing was trained")


def _environment(name: str, default: int) -> int:
    """A number that torchrun gives its processes; raises UsageError where it is none."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UsageError(f"environment {name}={text!r} is not a number; unset it, or start the processes with torchrun")
    return int(text or default)


def _report(error: Exception) -> int:
    """Print an error, once for all processes of a node, and hand it to torchrun for the end of its own message."""
    text = f"error: {error}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun's, one folder per process in a common one
    if path is None:
        print(text, file=sys.stderr, flush=True)
        return BAD_INPUT
    with contextlib.suppress(OSError):
        shown = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": shown}}))
    try:
        (Path(path).parents[1] / "error-told").touch(exist_ok=False)
    except FileExistsError:
        return BAD_INPUT
    except OSError:
        pass  # better twice than never
    print(text, file=sys.stderr, flush=True)
    return BAD_INPUT


if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from trainer.parallel import leave

        leave(code)
    sys.exit(code)
