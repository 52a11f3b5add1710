"""What a segmentation model is trained by: cross-entropy and soft Dice over the labelled pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def segmentation_loss(logits: Tensor, mask: Tensor, *, ignore: int = 255, dice: float = 1.0) -> dict[str, Tensor]:
    """Cross-entropy + dice · multi-class soft Dice, each a mean over the samples of a batch.

    Both terms are those of one sample at a time: cross-entropy is the mean over its labelled pixels, Dice the mean of
    1 − 2 Σ p·t / (Σ p + Σ t) over the classes that its truth holds. A class absent from a sample's truth has no term of
    its own; predicting it still costs the classes whose pixels it takes. A sample without a labelled pixel counts as
    0, with a gradient of 0. So the loss of a batch is the mean of its samples' whatever the others hold, and neither
    accumulation nor the number of ranks changes the objective. Computed in float32 whatever the logits are.

    Args:
        logits: (B, C, H, W) float.
        mask: (B, H, W) integer class ids; `ignore` = no label.
        ignore: the id that is left out.
        dice: weight of the Dice term.
    Returns:
        `loss` with its gradient, and `cross_entropy` and `dice` (both unweighted, detached): float32 scalars.
    Raises:
        ValueError: a mask of another size than the logits.
        RuntimeError: a class id ≥ C that is not `ignore` (on the CPU; a GPU asserts).
    Source:
        Milletari et al. 2016 (V-Net), eq. 3 without squares, over classes.
    """
    if logits.dim() != 4 or mask.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and mask {tuple(mask.shape)} are not (B, C, H, W) and (B, H, W)"
        )
    logits = logits.float().flatten(2)  # (B, C, N); half precision overflows in sums over pixels
    target = mask.flatten(1).long()
    labelled = target != ignore
    log_probability = logits.log_softmax(dim=1)
    own = log_probability.gather(1, torch.where(labelled, target, 0)[:, None])[:, 0]  # of the true class, (B, N)
    cross_entropy = -(torch.where(labelled, own, 0.0).sum(dim=1) / labelled.sum(dim=1).clamp(min=1)).mean()

    # Sums by class over (B, N) take half the time of products with a one-hot (B, C, N).
    num_classes = logits.shape[1]
    slot = torch.where(labelled, target, num_classes)
    sums = own.new_zeros(len(own), num_classes + 1)
    size = sums.scatter_add(1, slot, torch.ones_like(own))[:, :num_classes]
    overlap = sums.scatter_add(1, slot, own.exp())[:, :num_classes]
    mass = (log_probability.exp() * labelled[:, None]).sum(dim=2)
    score = 2 * overlap / (mass + size).clamp(min=1)  # where a class is present, its size alone is 1 or more
    present = size > 0
    missed = ((1 - score) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    soft_dice = missed.mean()
    return {
        "loss": cross_entropy + dice * soft_dice,
        "cross_entropy": cross_entropy.detach(),
        "dice": soft_dice.detach(),
    }
