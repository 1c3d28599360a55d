"""lm-eval's tasks on an MPT: likelihoods of texts and continuations of prompts, in batches of similar length, and the
adapter through which that library asks for them.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpt import MptForCausalLM
from mpt.model import linear
from trainer.data.tokenizer import DEFAULT_EOS, model_ends, model_tokenizer
from trainer.data.workers import Progress
from trainer.errors import InputError
from trainer.evaluate import TOKENS_PER_BATCH
from trainer.parallel import World

LOGITS = 1024  # positions whose logits are held at once
MAX_NEW_TOKENS = 256  # where a task says nothing, as in lm-eval's own adapters
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names for one thing, in lm-eval
OPTIONS = ("top_k", "top_p", "repetition_penalty")

T = TypeVar("T")
Pair = tuple[list[int], list[int]]  # ids of a context, which is not empty, and of what follows it


class TextModel:
    """A model and its tokenizer as functions of texts, which lm-eval's conventions decide.

    Results are in the order of the requests, and are what each would be alone, to rounding (drawn text excepted).
    """

    def __init__(
        self, model: MptForCausalLM, files: Mapping[str, bytes], *, max_length: int | None = None,
        batch_size: int | None = None, quiet: bool = False, world: World | None = None,
    ) -> None:  # fmt: skip
        """files: contents of tokenizer.json and of the settings beside it. max_length: tokens that the model reads at
        most, the end of a longer text; None: max_seq_len. batch_size: texts of a forward; None: as many as make some
        thousand tokens. world: processes that all hold the model, are asked the same, and share the work; every one
        gets all results.
        """
        config = model.config
        self.model, self.tokenizer, self.quiet = model.eval(), model_tokenizer(files, config.vocab_size), quiet
        self.max_length = config.max_seq_len if max_length is None else max_length
        self.batch_size, self.world = batch_size, world
        self._turn = 0  # batches so far: every process counts the same ones
        self.ends = model_ends(config.eos_token_id, files, self.tokenizer)
        self.device = model.get_input_embeddings().weight.device
        if not self.ends:
            raise InputError(
                "neither the model's configuration nor the tokenizer says which token ends a text, and there is no "
                f"{DEFAULT_EOS}; set eos_token_id in config.json"
            )
        if self.max_length < 2:
            raise InputError(f"--max-length {self.max_length}: give 2 tokens or more")
        if config.learned_positions and self.max_length > config.max_seq_len:
            raise InputError(
                f"--max-length {self.max_length}: the model's learned positions end at max_seq_len "
                f"{config.max_seq_len}; give at most that"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none added before or after."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def loglikelihoods(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln p of the continuation, and whether greedy decoding would give it.

        Both are encoded as one text and then cut; spaces at a context's end belong to the continuation. An empty
        context is the end token. InputError where a continuation is longer than max_length.
        """
        return self._score([self._pair(*request) for request in requests], "loglikelihood")

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """ln p of each whole text after the end token. A text of more than max_length tokens is read in windows: each
        token is predicted once, and the last window reaches back as far as it may.
        """
        pieces = [windows(self.encode(text), self.ends[0], self.max_length) for text in texts]
        scores = iter(self._score([pair for piece in pieces for pair in piece], "loglikelihood_rolling"))
        return [sum(next(scores)[0] for _ in piece) for piece in pieces]

    def continuations(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """For each (prompt, settings): what follows, up to an end token, a stop string (left out) or the limit.

        settings: of a task's generation_kwargs; see `generation_options`. The end of a prompt is read where it and the
        new tokens together would be longer than max_length.
        """
        found: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(requests):
            alike.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
        with Progress("generate_until", len(requests), self.quiet) as progress:
            for places in alike.values():
                options = generation_options(requests[places[0]][1])
                if (room := self.max_length - options["max_new_tokens"]) < 1:
                    raise InputError(
                        f"{options['max_new_tokens']} new tokens leave no room for a prompt in {self.max_length}: "
                        "raise --max-length, or lower max_gen_toks in the task's generation_kwargs"
                    )
                prompts = [(self.encode(requests[i][0]) or self.ends[:1])[-room:] for i in places]
                for rows in self._batches([len(prompt) + options["max_new_tokens"] for prompt in prompts]):
                    for row, text in zip(rows, self._continue([prompts[row] for row in rows], options)):
                        found[places[row]] = text
                    progress.advance(len(rows))
        return self._gathered(found, [""] * len(requests))

    def _pair(self, context: str, continuation: str) -> Pair:
        if not context:
            ids = self.encode(continuation)
            # A continuation that begins with the end token has its context already.
            return (ids[:1], ids[1:]) if ids[:1] == self.ends[:1] else (self.ends[:1], ids)
        stem = context.rstrip()
        first = self.encode(stem)
        whole = self.encode(context + continuation)
        if not first:  # a context of spaces only
            return self.ends[:1], whole
        return first, whole[len(first) :]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Places of `lengths`, the longest first, so that a batch has little padding and memory runs out at once; of
        several processes each takes its turn.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        first = 0
        while first < len(order):
            rows = self.batch_size or max(TOKENS_PER_BATCH // max(lengths[order[first]], 1), 1)
            if self.world is None or self._turn % self.world.size == self.world.rank:
                yield order[first : first + rows]
            first, self._turn = first + rows, self._turn + 1

    def _gathered(self, found: dict[int, T], out: list[T]) -> list[T]:
        """`out` with what all processes found put in its places."""
        for part in [found] if self.world is None else self.world.gather(found):
            for place, value in part.items():
                out[place] = value
        return out

    @torch.no_grad()
    def _score(self, pairs: Sequence[Pair], name: str) -> list[tuple[float, bool]]:
        for _, continuation in pairs:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens is longer than {self.max_length}: raise --max-length"
                )
        # The last token is predicted and not read.
        texts = [(context + continuation)[-self.max_length - 1 : -1] for context, continuation in pairs]
        found: dict[int, tuple[float, bool]] = {}
        todo = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        with Progress(name, len(todo), self.quiet) as progress:
            for places in self._batches([len(texts[i]) for i in todo]):
                rows = [todo[place] for place in places]
                sizes = [len(pairs[i][1]) for i in rows]
                hidden = self._hidden([texts[i] for i in rows], sizes)
                targets = torch.tensor([i for row in rows for i in pairs[row][1]], device=self.device)
                logp, greedy = self._log_probabilities(hidden, targets)
                for i, p, same in zip(rows, logp.split(sizes), greedy.split(sizes)):
                    found[i] = float(p.sum()), bool(same.all())
                progress.advance(len(rows), sum(len(texts[i]) for i in rows))
        return self._gathered(found, [(0.0, True)] * len(pairs))

    def _hidden(self, texts: list[list[int]], sizes: list[int]) -> Tensor:
        """(N, d): of each text's last `size` positions, one text after the other."""
        # Padding stands behind, where causal attention does not see it: no mask is needed.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], True)
        prefix = None
        if self.model.config.attn_config.prefix_lm:  # a context sees itself both ways, as in generation
            prefix = torch.zeros_like(ids, dtype=torch.bool)
            for row, (text, size) in enumerate(zip(texts, sizes)):
                prefix[row, : len(text) - size + 1] = True
            prefix = prefix.to(self.device)
        out = self.model.transformer(ids.to(self.device), prefix_mask=prefix, use_cache=False, return_dict=True)
        hidden: Tensor = out.last_hidden_state
        return torch.cat([row[len(text) - size : len(text)] for row, text, size in zip(hidden, texts, sizes)])

    def _log_probabilities(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """ln p (N,), float64, of targets (N,) after hidden states (N, d), and whether each is the likeliest token."""
        head, factor = self.model.get_output_embeddings().weight, self.model.config.logit_factor
        assert isinstance(head, Tensor)
        logp = torch.empty(len(targets), dtype=torch.float64)
        greedy = torch.empty(len(targets), dtype=torch.bool)
        for first in range(0, len(targets), LOGITS):
            part = slice(first, first + LOGITS)
            logits = (linear(hidden[part], head) * factor).float()
            chosen = logits.gather(1, targets[part, None])[:, 0]
            logp[part] = (chosen - logits.logsumexp(1)).cpu()
            greedy[part] = (logits.argmax(1) == targets[part]).cpu()
        return logp, greedy

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        out = self.model.generate(ids, real, eos_token_id=self.ends, tokenizer=self.tokenizer, **options)
        return [self._text(row[width:].tolist(), options["stop_strings"]) for row in out]

    def _text(self, ids: list[int], stops: Sequence[str]) -> str:
        end = next((place for place, i in enumerate(ids) if i in self.ends), len(ids))
        text = str(self.tokenizer.decode(ids[:end]))
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def windows(ids: list[int], prefix: int, max_length: int) -> list[Pair]:
    """A text as (context, continuation) pairs, each token in one continuation; with a context at most max_length + 1
    tokens, of which the last is only predicted.
    """
    text = [prefix, *ids]
    out = []
    for start in range(1, len(text), max_length):
        end = min(start + max_length, len(text))
        out.append((text[max(end - 1 - max_length, 0) : start], text[start:end]))
    return out


def generation_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for a task's generation_kwargs: until, max_gen_toks (or another of its names), do_sample,
    temperature, top_k, top_p, repetition_penalty. A temperature of 0 is greedy. InputError for what is not known.
    """
    rest = dict(settings)
    until = rest.pop("until", None) or []
    limits = [rest.pop(name) for name in LIMITS if rest.get(name) is not None]
    temperature = float(rest.pop("temperature", None) or 0.0)
    do_sample = rest.pop("do_sample", None)
    drawn = temperature > 0 if do_sample is None else bool(do_sample) and temperature != 0
    options: dict[str, Any] = {
        "max_new_tokens": int(limits[0]) if limits else MAX_NEW_TOKENS,
        "stop_strings": [stop for stop in ([until] if isinstance(until, str) else until) if stop],
        "do_sample": drawn,
        **({"temperature": temperature} if drawn else {}),
        **{name: rest.pop(name) for name in OPTIONS if name in rest},
    }
    if unknown := sorted(name for name, value in rest.items() if (name, value) != ("num_beams", 1)):
        raise InputError(
            f"generation_kwargs has {', '.join(f'{name}={rest[name]!r}' for name in unknown)}, which is not supported; "
            f"known are until, {', '.join(LIMITS)}, do_sample, temperature, {', '.join(OPTIONS)}"
        )
    return options


@dataclass(frozen=True)
class Tasks:
    """Tasks that there are, by name, and lm-eval's TaskManager, which knows their files."""

    names: list[str]
    manager: Any


def find_tasks(tasks: Sequence[str], path: str | Path | None = None) -> Tasks:
    """Some of lm-eval's tasks, groups or tags; patterns such as `mmlu_*` are understood.

    path: a folder with task files of one's own, beside lm-eval's. InputError where lm-eval or a task is not there.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"--tasks needs lm-eval ({error}); install it with: pip install 'mpt-train[eval]'") from None
    import yaml

    if path is not None and not Path(path).is_dir():
        raise InputError(f"--tasks-path {path}: there is no such folder")
    try:
        manager = TaskManager(include_path=None if path is None else str(path))
    except yaml.YAMLError as error:
        raise InputError(f"a task file is not readable as YAML: {error}") from None
    except OSError as error:
        raise InputError(f"a task file cannot be read: {error}") from None
    return Tasks(_known(tasks, manager, path), manager)


def run_tasks(
    text_model: TextModel, tasks: Tasks, *, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """lm-eval's results of `find_tasks`.

    Of several processes all have to call this; lm-eval gives its results to the first of each machine, others get {}.
    num_fewshot: examples before each question; None: as the task has it. limit: only a task's first questions.
    InputError where a task's file or data cannot be had.
    """
    import lm_eval
    import yaml

    try:
        results = lm_eval.simple_evaluate(
            model=_adapter(text_model), tasks=tasks.names, task_manager=tasks.manager, num_fewshot=num_fewshot,
            limit=limit, log_samples=False,
        )  # fmt: skip
    except yaml.YAMLError as error:
        raise InputError(f"a task file is not readable as YAML: {error}") from None
    except OSError as error:  # also of datasets and of the hub, which has no network
        raise InputError(
            f"data of {', '.join(tasks.names)} cannot be had ({_first_line(error)}); without a network, fill the cache "
            "of datasets elsewhere and copy it, or give tasks with local files in --tasks-path"
        ) from error
    return results or {}


def _known(tasks: Sequence[str], manager: Any, path: str | Path | None) -> list[str]:
    out: list[str] = []
    for name in tasks:
        found = manager.match_tasks([name])
        if not found:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}?" if close else "`lm-eval ls tasks` lists what there is"
            where = "" if path is None else f" and {path} adds none of that name"
            raise InputError(f"task {name!r} is not one of lm-eval's{where}; {hint}")
        out += [task for task in found if task not in out]
    return out


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _adapter(text_model: TextModel) -> Any:
    """The text model as lm-eval's LM, whose class is only here where that library is."""
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return text_model.loglikelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return text_model.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return text_model.continuations([request.args for request in requests])

    return Adapter()


def table(results: Mapping[str, Any]) -> str:
    """lm-eval's own table of results, and of groups where there are any."""
    from lm_eval.utils import make_table

    kinds = [kind for kind in ("results", "groups") if results.get(kind)]
    return "\n".join(make_table(results, kind).strip() for kind in kinds)
