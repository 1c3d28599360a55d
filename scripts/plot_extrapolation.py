"""Perplexity by position: how well models use, and stand, more context than they were trained with."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from mpt import MptForCausalLM
from trainer import InputError
from trainer.data.shards import ShardSet


def losses_by_position(model: MptForCausalLM, sequences: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    """Mean loss in nats of predicting the token at each position but the first: float64 (S - 1,).

    sequences: ids (S,) each. No logits exist whole, and no more than one sequence's hidden states.
    """
    weight = model.get_output_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    total = np.zeros(len(sequences[0]) - 1)
    with torch.no_grad():
        for ids in sequences:
            hidden = model.transformer(ids[None, :-1], return_dict=True).last_hidden_state
            losses = kernels.linear_cross_entropy(
                hidden[0], weight, ids[1:], logit_scale=model.config.logit_factor, reduction="none"
            )
            total += losses.double().numpy()
    return total / len(sequences)


def read_sequences(folder: Path, split: str, length: int, most: int) -> list[torch.Tensor]:
    """Up to `most` sequences of `length` tokens, in order, from a folder of token shards: the beginnings of excerpts,
    where it holds excerpts, without those that are filled up.
    """
    shards = ShardSet(folder, split)
    excerpt, eos_id = shards.manifest.excerpt_tokens, shards.manifest.eos_id
    found: list[torch.Tensor] = []
    for index in range(len(shards.shards)):
        ids = shards.array(index)
        pieces = ids[: len(ids) // (excerpt or length) * (excerpt or length)].reshape(-1, excerpt or length)
        for piece in pieces[:, :length]:
            if len(found) < most and len(piece) == length and not (excerpt and (piece[-2:] == eos_id).all()):
                found.append(torch.from_numpy(piece.astype(np.int64)))
    if not found:
        longest = excerpt or max(shard.tokens for shard in shards.shards)
        raise InputError(
            f"{folder}: no {'excerpt' if excerpt else 'shard'} of split {split!r} has {length} tokens, the longest has "
            f"{longest}; lower --length"
        )
    return found


def buckets(length: int) -> list[tuple[int, int]]:
    """Ranges of positions, each twice as far as the one before it: 1-64, 64-128, 128-256, ... up to length."""
    ends = [64 << i for i in range(length.bit_length()) if 64 << i < length]
    return list(zip([1, *ends], [*ends, length + 1]))


def summary(losses: np.ndarray[Any, Any], trained: int) -> dict[str, Any]:
    """Loss and perplexity by bucket, and within and beyond the length that the model was trained with."""

    def mean(first: int, end: int) -> float | None:
        part = losses[first - 1 : end - 1]
        return float(part.mean()) if len(part) else None

    rows = [{"from": a, "to": b - 1, "loss": (loss := mean(a, b)), "perplexity": math.exp(loss or 0.0)}
            for a, b in buckets(len(losses))]  # fmt: skip
    return {
        "trained_length": trained,
        "loss_within": mean(1, trained),
        "loss_beyond": mean(trained, len(losses) + 1),
        "by_position": rows,
    }


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="position (tokens before it)", ylabel="perplexity", xscale="log")
    for name, result in results.items():
        rows = result["by_position"]
        (line,) = axes.plot([row["to"] for row in rows], [row["perplexity"] for row in rows], marker="o", label=name)
        axes.axvline(result["trained_length"], color=line.get_color(), linestyle=":")
    axes.set_title("dotted: the length that a model was trained with", fontsize="small")
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="Hugging Face folders, e.g. a run's export"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="token shards with long documents")
    parser.add_argument("--split", default="val", help="of the shards (default: val)")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="tokens of each (default: 4096)")
    parser.add_argument("--sequences", type=int, default=16, metavar="N", help="at most so many (default: 16)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.json and FILE.png are written")
    args = parser.parse_args(argv)
    for name, least in (("length", 2), ("sequences", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: give at least {least}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    results = {}
    try:
        sequences = read_sequences(args.data, args.split, args.length, args.sequences)
        for folder in args.models:
            model = MptForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if max(int(ids.max()) for ids in sequences) >= model.config.vocab_size:
                raise InputError(
                    f"{folder}: vocab_size {model.config.vocab_size} is too small for the ids in {args.data}"
                )
            results[str(folder)] = summary(losses_by_position(model, sequences), model.config.max_seq_len)
    except (InputError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, result in results.items():
        beyond = result["loss_beyond"]
        said = "nothing read beyond" if beyond is None else f"{beyond:.4f} beyond"
        print(
            f"{name}: loss {result['loss_within']:.4f} nats within its {result['trained_length']:,} tokens, {said}; "
            + ", ".join(f"to {row['to']:,}: {row['perplexity']:.2f}" for row in result["by_position"])
        )
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
