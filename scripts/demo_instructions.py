"""Make the fine-tuning demos' data: questions about the functions in the pretraining demo's corpus, with answers."""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_BODY = 400  # characters of a function's source: what the demo model's 256 tokens have room for
LONGEST_ANSWER = 160
MOST_ARGUMENTS = 6


@dataclass(frozen=True)
class Function:
    """A documented function: its name, the names of its arguments, its source without the docstring, its summary."""

    name: str
    arguments: tuple[str, ...]
    source: str
    summary: str


def functions(text: str) -> Iterator[Function]:
    """The functions of a module's source whose docstring starts with a sentence, and that are short enough."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if not re.fullmatch(r"[A-Z].{10,}\.", summary) or len(summary) > LONGEST_ANSWER:
            continue
        node.body = node.body[1:] or [ast.Pass()]
        node.decorator_list = []
        source = ast.unparse(node)
        arguments = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        if len(source) <= LONGEST_BODY and len(arguments) <= MOST_ARGUMENTS:
            yield Function(node.name, arguments, source, summary)


def arguments_answer(function: Function) -> str:
    """The arguments in a sentence."""
    names = [name for name in function.arguments if name not in ("self", "cls")]
    if not names:
        return f"{function.name} takes no arguments."
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{function.name} takes {listed}."


def instructions(function: Function) -> Iterator[dict[str, Any]]:
    """Dolly's form: an instruction, a context, a response."""
    yield {"instruction": f"What does the function {function.name} do?", "context": function.source,
           "response": function.summary}  # fmt: skip
    yield {"instruction": f"Which arguments does the function {function.name} take?", "context": function.source,
           "response": arguments_answer(function)}  # fmt: skip


def conversations(function: Function) -> Iterator[dict[str, Any]]:
    """One conversation of two turns."""
    turns = [
        ("user", f"Which arguments does this function take?\n{function.source}"),
        ("assistant", arguments_answer(function)),
        ("user", "And what does it do?"),
        ("assistant", function.summary),
    ]
    yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def make_demo(corpus: Path, out: Path) -> None:
    """Writes OUT/{instruct,chat}/{train,val}.jsonl from CORPUS/{corpus,validation}.jsonl.

    So the functions held out here are from the files that the pretraining demo holds out too.
    """
    for file, part in (("corpus", "train"), ("validation", "val")):
        with open(corpus / f"{file}.jsonl", encoding="utf-8") as rows:
            texts = [json.loads(row)["text"] for row in rows]
        found = [function for text in texts for function in functions(text)]
        for kind, make in (("instruct", instructions), ("chat", conversations)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for function in found for row in make(function)]
            unique = dict.fromkeys(lines)  # the library repeats some functions
            path = out / kind / f"{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(unique), encoding="utf-8")
            print(f"{path}: {len(unique):,} examples")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus", default="data/demo", metavar="DIR", help="what scripts/demo_corpus.py made (default: data/demo)"
    )
    parser.add_argument(
        "--out",
        default="data/demo-instructions",
        metavar="DIR",
        help="where to put it (default: data/demo-instructions)",
    )
    args = parser.parse_args(argv)
    try:
        make_demo(Path(args.corpus), Path(args.out))
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not there; run scripts/demo_corpus.py first", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
