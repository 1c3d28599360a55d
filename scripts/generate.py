"""Continue prompts with a model, or chat with it, printing the text as it comes.

CHECKPOINT is a Hugging Face folder, a run's folder or one of its step-N, a Composer .pt file, or a name on the hub.
Without --prompt the prompt is read from standard input. Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
Example: python scripts/generate.py runs/mpt-tiny/export --prompt "def main(" --temperature 0.8 --seed 1
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from mpt import MptForCausalLM
    from mpt.generate import TextDecoder
    from trainer.data.templates import Marker

# Our packages take seconds to import: inside the functions, so that Ctrl-C is answered in a line from the start.


class Unusable(Exception):
    """Input that cannot be used; the message says what to do."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint, or a name on the hub")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one or several; - is standard input"
    )
    what.add_argument("--chat", action="store_true", help="talk in ChatML: a message per line, an empty one ends")
    parser.add_argument("--instruct", action="store_true", help="put each prompt into the template of MPT-Instruct")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of each answer (default: 256)")
    parser.add_argument("--do-sample", action="store_true", help="draw tokens; the next three options imply it")
    parser.add_argument("--temperature", type=float, metavar="T", help="of the draws (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that together reach P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: fewer repeats")
    parser.add_argument(
        "--eos-token-id", type=int, nargs="+", metavar="ID", help="ids that end a text (default: the model's)"
    )
    parser.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a text, and are not printed"
    )
    parser.add_argument("--num-return-sequences", type=int, default=1, metavar="N", help="drawn for each prompt")
    parser.add_argument("--seed", type=int, help="of the draws (default: another one each time)")
    parser.add_argument("--tokenizer", metavar="NAME", help="file, folder or hub name (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (default: its main branch)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: theirs)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--no-cache", action="store_true", help="compute every step from all tokens again")
    args = parser.parse_args(argv)
    if args.chat and (args.instruct or args.num_return_sequences > 1 or args.no_cache):
        parser.error("--chat goes without --instruct, --num-return-sequences and --no-cache")
    if args.system is not None and not args.chat:
        parser.error("--system goes with --chat")
    if args.num_return_sequences > 1 and not draws(args):
        parser.error(
            f"--num-return-sequences {args.num_return_sequences}: without drawing they would be equal; add --do-sample"
        )
    return args


def draws(args: argparse.Namespace) -> bool:
    """Whether tokens are drawn."""
    return args.do_sample or any(v is not None for v in (args.temperature, args.top_k, args.top_p))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    warnings.showwarning = lambda text, *_: print(f"warning: {text}", file=sys.stderr)
    try:
        return _run(args)
    except (Unusable, ValueError) as error:  # InputError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(args: argparse.Namespace) -> int:
    prompts = [] if args.chat else read_prompts(args)
    model, tokenizer = load(args)
    if args.chat:
        Chat(model, tokenizer, args).talk()
        return 0
    for i, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"{'' if i == 0 else chr(10)}==> {_short(prompt)} <==", flush=True)
        complete(model, tokenizer, prompt, args)
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts, from the command line or standard input."""
    if args.prompt is None and sys.stdin.isatty():
        raise Unusable("no prompt; give --prompt TEXT, --chat, or the prompt on standard input")
    given = args.prompt or ["-"]
    if given.count("-") > 1:
        raise Unusable("--prompt - is given twice; standard input can be read once")
    prompts = [sys.stdin.read() if text == "-" else text for text in given]
    for i, text in enumerate(prompts):
        if not text.strip() if args.instruct else not text:
            where = "standard input" if given[i] == "-" else f"--prompt number {i + 1}"
            raise Unusable(f"the prompt is empty ({where}); give a text to go on from")
    return prompts


def load(args: argparse.Namespace) -> tuple["MptForCausalLM", "Tokenizer"]:
    """The model and its tokenizer, and into args.eos_token_id what ends a text, where it is not given."""
    import torch

    from mpt import MptForCausalLM
    from mpt.checkpoint import open_checkpoint
    from trainer.data.tokenizer import model_ends, model_tokenizer
    from trainer.evaluate import tokenizer_files

    source = open_checkpoint(args.checkpoint, revision=args.revision, check_hashes=True)
    config, files = source.config(), tokenizer_files(source, args.tokenizer)
    tokenizer = model_tokenizer(files, config.vocab_size)
    if args.eos_token_id is None:
        args.eos_token_id = model_ends(config.eos_token_id, source.companions | files, tokenizer)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    try:
        model = MptForCausalLM.from_pretrained(source, dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:  # a device that does not exist, or has no room
        raise Unusable(f"{args.checkpoint} on {device}: {str(error).splitlines()[0]}") from None
    return model, tokenizer


def options(args: argparse.Namespace, model: "MptForCausalLM", prompt: int) -> dict[str, Any]:
    """generate's arguments. Where learned positions end, so does the text."""
    config = model.config
    new = args.max_new_tokens
    if config.learned_positions:
        new = min(new, config.max_seq_len - prompt + 1)
        if new < 1:
            raise Unusable(f"the text has {prompt} tokens, and the model's positions end at {config.max_seq_len}")
    return {
        "max_new_tokens": new,
        "do_sample": draws(args),
        "temperature": 1.0 if args.temperature is None else args.temperature,
        "top_k": args.top_k,
        "top_p": 1.0 if args.top_p is None else args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "eos_token_id": args.eos_token_id,
        "seed": args.seed,
    }


def encode(tokenizer: "Tokenizer", prompt: str, ends: Sequence[int], *, instruct: bool) -> list[int]:
    """Ids of a prompt; in the template, as in training, special tokens and ends that it spells out are text."""
    if not instruct:
        return list(tokenizer.encode(prompt).ids)
    from trainer.data.examples import SegmentEncoder
    from trainer.data.templates import INSTRUCT, Segment

    text = INSTRUCT.format(instruction=prompt.strip("\n"))
    return SegmentEncoder(tokenizer, ends).encode([[Segment((text,), trained=False)]])[0][0]


def complete(model: "MptForCausalLM", tokenizer: "Tokenizer", prompt: str, args: argparse.Namespace) -> None:
    """Print what follows one prompt: as it comes, or, of several sequences, one after the other."""
    import torch

    ids = encode(tokenizer, prompt, args.eos_token_id, instruct=args.instruct)
    if not ids:
        raise Unusable(f"the prompt {prompt!r} has no tokens; give a text to go on from")
    several = args.num_return_sequences > 1
    printer = Printer(tokenizer, args.stop, args.eos_token_id)
    out = model.generate(
        torch.tensor([ids], device=model.device),
        **options(args, model, len(ids)),
        stop_strings=args.stop,
        tokenizer=tokenizer,
        num_return_sequences=args.num_return_sequences,
        use_cache=not args.no_cache,
        streamer=None if several else printer,
    )
    if several:
        for i, row in enumerate(out):
            print(f"--- {i + 1}")
            printer = Printer(tokenizer, args.stop, args.eos_token_id)
            for token in (row[:0], *row[len(ids) :, None]):
                printer.put(token)
            printer.end()


class Printer:
    """A streamer that prints one row's text: whole characters, and nothing of a text that ends it.

    Where one of `ends` or of `stops` comes first there is no text, which is said on standard error.
    """

    def __init__(self, tokenizer: "TextDecoder", stops: Sequence[str], ends: Sequence[int] = ()) -> None:
        from mpt.generate import TextStream

        self.ids: list[int] = []
        self._stream, self._stops, self._ends = TextStream(tokenizer), stops, ends
        self._held, self._prompt, self._stopped, self._empty = "", True, False, True

    def put(self, value: "Tensor") -> None:
        """The prompt first, which is not printed, then one token at a time."""
        if self._prompt:
            self._prompt = False
            return
        token = int(value)
        self.ids.append(token)
        self._write(self._stream.put(token))

    def end(self) -> None:
        """The rest, and a line's end."""
        self._write(self._stream.pending())
        print(self._held, flush=True)
        if (self.ids and self.ids[0] in self._ends) or (self._stopped and self._empty):
            print("note: no text: what ends it came first", file=sys.stderr)
        self._held = ""

    def _write(self, text: str) -> None:
        if self._stopped:
            return
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            text, self._held, self._stopped = text[: min(found)], "", True
        else:  # what may be the beginning of a stop string waits
            kept = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self._empty = self._empty and not text
        print(text, end="", flush=True)


class Chat:
    """A conversation in ChatML. Its ids, and the cache of all but the newest, stay from turn to turn.

    It is encoded as in training: what a message spells out of ChatML or of special tokens is text.
    """

    def __init__(self, model: "MptForCausalLM", tokenizer: "Tokenizer", args: argparse.Namespace) -> None:
        from mpt import MptCache
        from trainer.data.examples import SegmentEncoder
        from trainer.data.templates import IM_END, message

        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.encoder = SegmentEncoder(tokenizer, args.eos_token_id)
        self.cache, self.ids = MptCache(), []  # type: tuple[MptCache, list[int]]
        self.end = self.encoder.marker_id(IM_END)
        self.ends = [*args.eos_token_id, *([] if self.end is None else [self.end])]
        self.stops = [*args.stop, *([IM_END.text] if self.end is None else [])]
        # Of the conversation, what is not encoded yet: with the next message, as in training.
        self.pending: tuple[str | Marker, ...] = () if args.system is None else message("system", args.system)

    def talk(self) -> None:
        """Answers messages, one per line, until the input ends or a line is empty. Ctrl-C ends an answer."""
        while said := self._listen():
            self.ask(said)
            printer = Printer(self.tokenizer, self.stops, self.ends)
            try:
                self._answer(printer)
            except KeyboardInterrupt:
                printer.end()
            self.close(printer.ids)

    def ask(self, said: str) -> None:
        """Adds a message of the user's and the beginning of its answer."""
        from trainer.data.templates import Segment, header, message

        segment = Segment((*self.pending, *message("user", said), *header("assistant")), trained=False)
        self.ids += self.encoder.encode([[segment]])[0][0]

    def close(self, answer: list[int]) -> None:
        """Adds an answer; however it ended, its message ends as ChatML has it."""
        from trainer.data.templates import IM_END

        self.ids += answer
        if self.end is None:
            ended = self.encoder.decode(answer).endswith(IM_END.text)
        else:
            ended = answer[-1:] == [self.end]
        self.pending = ("\n",) if ended else (IM_END, "\n")

    def _listen(self) -> str:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return ""

    def _answer(self, printer: Printer) -> None:
        import torch

        kwargs = options(self.args, self.model, len(self.ids)) | {"eos_token_id": self.ends}
        self.model.generate(
            torch.tensor([self.ids], device=self.model.device),
            **kwargs,
            stop_strings=self.stops,
            tokenizer=self.tokenizer,
            streamer=printer,
            past_key_values=self.cache,
        )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
