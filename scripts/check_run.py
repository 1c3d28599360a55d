"""Judge a finished run: it learned more than the tokens' frequencies, or than its base knew, and transformers computes
its export's logits.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from trainer import InputError, load_config
from trainer.data import unigram_entropy


def learned(run: Path) -> tuple[float, float, str]:
    """The run's validation loss, what it has to be under, in nats per token, and what that is.

    Of token shards: the unigram entropy of the corpus that it trained on. Of a fine-tune: the loss before the first
    step.
    """
    config = load_config(run / "config.yaml")
    loader = config.train_loader
    loss = float(json.loads((run / "summary.json").read_text())["eval_loss"])
    if loader.name == "finetuning" or config.load_path is not None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        base = next((row["eval_loss"] for row in rows if row["step"] == 0), None)
        if base is None:
            raise InputError(f"{run}: was not evaluated before its first step; give a run with eval_first=true")
        return loss, float(base), "the base model's loss"
    if loader.dataset.local is None:
        raise InputError(f"{run}: trained on a mix, which has no one unigram entropy; give a run on one data folder")
    split = loader.dataset.split or "train"
    name = f"unigram entropy of the corpus (its {split} split; summary.json has that of the validation split)"
    return loss, unigram_entropy(loader.dataset.local, split), name


def largest_difference(export: Path, length: int) -> float:
    """max|a-b| / max|b| of the logits (1, <= length, vocab) that we (a) and transformers (b) compute in fp32."""
    import transformers

    from mpt import MptForCausalLM

    transformers.utils.logging.disable_progress_bar()
    ours = MptForCausalLM.from_pretrained(export).eval()
    theirs = transformers.MptForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    length = min(length, ours.config.max_seq_len)  # transformers goes no further
    ids = torch.randint(ours.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    return float((a - b).abs().max() / b.abs().max())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder, e.g. runs/mpt-tiny")
    parser.add_argument("--margin", type=float, default=1.0, help="nats under that (default 1)")
    parser.add_argument("--length", type=int, default=128, help="tokens to compare (default 128)")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default 1e-5)")
    args = parser.parse_args(argv)
    for name in ("config.yaml", "summary.json", "export/config.json"):
        if not (args.run / name).is_file():
            print(f"error: {args.run} has no {name}; give the folder of a finished run", file=sys.stderr)
            return 2
    try:
        loss, bar, name = learned(args.run)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    below = bar - loss
    verdict = "learned" if below >= args.margin else "DID NOT LEARN"
    print(
        f"{args.run}: {verdict}: validation loss {loss:.4f} nats per token, {name} {bar:.4f}: {below:.2f} under it "
        f"({args.margin:g} expected)"
    )
    if below < args.margin:
        print("If the run was a short one, train for longer (max_duration) or ask for less (--margin)")
    difference = largest_difference(args.run / "export", args.length)
    same = "equal" if difference <= args.tolerance else "DIFFERENT"
    print(f"{args.run / 'export'}: logits {same} to transformers' (largest relative difference {difference:.1e})")
    return 0 if below >= args.margin and difference <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
