"""Losses of the classifiers, labels checked: means over what counts, 0 where nothing does, in fp32 at least.

On a GPU labels are not looked at, which would wait for it: there torch's own assertion stops a class out of range.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mpt.config import MptConfig
from mpt.model import readable

IGNORED = -100


def sequence_loss(logits: Tensor, labels: Tensor, config: MptConfig) -> Tensor:
    """Of logits (B, num_labels), as config.problem_type says; where that is None: regression for num_labels 1, else
    single label for whole numbers and multi label for others.

    labels: of regression (B, num_labels), or (B,) for num_labels 1, mean square; of single label (B,) int,
        cross-entropy, -100 does not count; of multi label (B, num_labels), 0 to 1, binary cross-entropy.
    """
    _check_tensor(labels)
    kind, number = config.problem_type, logits.shape[-1]
    if kind is None:
        classes = "single_label_classification" if _whole(labels) else "multi_label_classification"
        kind = "regression" if number == 1 else classes
    reason = f"problem_type {kind} with num_labels {number}"
    logits = _wide(logits)
    if kind == "single_label_classification":
        _check_shape(labels, [logits.shape[:1]], reason)
        return classes_loss(logits, labels, reason)
    _check_shape(labels, [logits.shape, logits.shape[:1]] if number == 1 else [logits.shape], reason)
    targets = labels.to(logits.dtype).view_as(logits)
    if kind == "regression":
        return F.mse_loss(logits, targets)
    if readable(labels) and not ((targets >= 0) & (targets <= 1)).all():
        raise ValueError(f"labels hold {float(targets.min())} to {float(targets.max())}; {reason} takes 0 to 1")
    return F.binary_cross_entropy_with_logits(logits, targets)


def token_loss(logits: Tensor, labels: Tensor, config: MptConfig) -> Tensor:
    """Of logits (B, S, num_labels) and labels (B, S): cross-entropy, or for num_labels 1 mean square; -100 does not
    count in either.
    """
    _check_tensor(labels)
    number = logits.shape[-1]
    reason = f"token classification with num_labels {number}"
    if config.problem_type not in (None, "regression" if number == 1 else "single_label_classification"):
        raise ValueError(
            f"problem_type is {config.problem_type!r}, which {reason} does not have; set it to None in config"
        )
    _check_shape(labels, [logits.shape[:2]], reason)
    logits = _wide(logits)
    if number > 1:
        return classes_loss(logits.flatten(0, 1), labels.flatten(), reason)
    counts = labels != IGNORED
    errors = logits[..., 0] - labels.to(logits.dtype)
    return torch.where(counts, errors.square(), 0).sum() / counts.sum().clamp(min=1)


def span_loss(start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Mean of two cross-entropies over positions. logits: (B, S). start, end: (B,) or (B, 1) int, clamped to 0..S; S,
    past the sequence, does not count.
    """
    rows, length = start_logits.shape
    losses = []
    for name, logits, positions in (("start_positions", start_logits, start), ("end_positions", end_logits, end)):
        _check_tensor(positions, name)
        _check_shape(positions, [torch.Size([rows]), torch.Size([rows, 1])], "question answering", name)
        _check_whole(positions, "a position in the sequence", name)
        positions = positions.long().view(rows).clamp(0, length)
        losses.append(_cross_entropy(_wide(logits), positions, ignored=length))
    return (losses[0] + losses[1]) / 2


def classes_loss(logits: Tensor, labels: Tensor, reason: str) -> Tensor:
    """Cross-entropy of logits (N, C) and labels (N,) int, 0 to C - 1; -100 does not count. reason: for errors."""
    _check_whole(labels, f"a class in 0..{logits.shape[1] - 1} ({reason})")
    labels = labels.long()
    if readable(labels):
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[1]))]
        if len(wrong):
            raise ValueError(f"labels hold {int(wrong[0])}; {reason} takes 0..{logits.shape[1] - 1}, or -100 to ignore")
    return _cross_entropy(logits, labels, ignored=IGNORED)


def _cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    total = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    return total / (labels != ignored).sum().clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _whole(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _check_tensor(labels: Tensor, name: str = "labels") -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name} are a {type(labels).__name__}; they must be a tensor")


def _check_whole(labels: Tensor, meaning: str, name: str = "labels") -> None:
    if not _whole(labels):
        raise ValueError(f"{name} are {labels.dtype}; each is {meaning}: pass integers")


def _check_shape(labels: Tensor, allowed: list[torch.Size], reason: str, name: str = "labels") -> None:
    if labels.shape not in allowed:
        shapes = " or ".join(str(tuple(shape)) for shape in allowed)
        raise ValueError(f"{name} are {tuple(labels.shape)}; for {reason} they must be {shapes}")
