"""Load an export in transformers and compare its logits with ours."""

import argparse
import sys
from pathlib import Path

import torch


def largest_difference(export: Path, length: int) -> float:
    """max|a-b| / max|b| of the logits (1, <= length, vocab) that we (a) and transformers (b) compute in fp32."""
    import transformers

    from mpt import MptForCausalLM

    ours = MptForCausalLM.from_pretrained(export).eval()
    theirs = transformers.MptForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    length = min(length, ours.config.max_seq_len)  # transformers goes no further
    ids = torch.randint(ours.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    return float((a - b).abs().max() / b.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="a folder with config.json and safetensors, e.g. runs/NAME/export")
    parser.add_argument("--length", type=int, default=128, help="tokens to compare (default 128)")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default 1e-5)")
    args = parser.parse_args()
    if not (args.export / "config.json").is_file():
        print(f"error: {args.export} has no config.json; give the export folder of a finished run", file=sys.stderr)
        return 2
    difference = largest_difference(args.export, args.length)
    verdict = "equal" if difference <= args.tolerance else "DIFFERENT"
    print(f"{args.export}: logits {verdict} to transformers' (largest relative difference {difference:.1e})")
    return 0 if difference <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
