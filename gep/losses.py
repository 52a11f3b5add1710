"""Objectives as pure functions: token regression, contrastive losses, similarity structure.

All of them compute in float32 even under autocast, and none of them detaches anything.
"""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Regression: TypeAlias = Literal["mse", "cosine", "mse_cosine", "smooth_l1"]


def regression(
    prediction: Tensor,
    target: Tensor,
    *,
    kind: Regression = "smooth_l1",
    weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Mean error of tokens.

    Args:
        prediction, target: (..., D) float.
        kind: "mse" and "smooth_l1" (knee at 1) are means over D; "cosine" is 1 - cosine, "mse_cosine" the sum of both.
        weight: (...) float or bool, one a token; 0 leaves the token out (whatever it holds, NaN included).
        denominator: what the weighted sum is divided by; None = the sum of the weights. Give the count
            over all ranks and micro-batches (divided by the number of addends that are averaged) to keep a
            token's share in the objective the same whoever computes it.
    Returns:
        scalar float32; 0 when all weights are 0.
    Raises:
        ValueError: shapes differ or the kind is unknown.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    with _float32(prediction):
        a, b = prediction.float(), target.float()
        if weight is not None:
            weight = weight.float().expand(a.shape[:-1])
            out = (weight == 0)[..., None]
            a, b = a.masked_fill(out, 0.0), b.masked_fill(out, 0.0)
        if kind == "mse":
            error = (a - b).square().mean(-1)
        elif kind == "smooth_l1":
            error = F.smooth_l1_loss(a, b, reduction="none").mean(-1)
        elif kind == "cosine":
            error = 1 - (normalise(a) * normalise(b)).sum(-1)
        elif kind == "mse_cosine":
            error = (a - b).square().mean(-1) + 1 - (normalise(a) * normalise(b)).sum(-1)
        else:
            raise ValueError(f"regression kind {kind!r}: choose one of mse, cosine, mse_cosine, smooth_l1")
        if weight is None:
            return error.mean() if denominator is None else error.sum() / denominator
        total = weight.sum().clamp_min(torch.finfo(torch.float32).tiny) if denominator is None else denominator
        return (error * weight).sum() / total


def info_nce(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    *,
    all_a: Tensor | None = None,
    all_b: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Symmetric InfoNCE: each row of `a` has to find its row of `b` among all, and the other way.

    With gathered rows, the mean over ranks and micro-batches of equal size equals the loss of one large
    batch; so does its gradient, where gathering carries the gradient back.

    Args:
        a, b: (B, P) float, paired by row; normalised here.
        scale: what cosines are multiplied by, 1 / temperature (not its logarithm).
        all_a, all_b: (M, P) rows of all ranks and micro-batches; [offset, offset + B) are the local ones.
            None = a, b.
        offset: first local row.
    Returns:
        scalar float32, mean over the B rows and both directions.
    Raises:
        ValueError: shapes do not fit.
    Source: van den Oord et al. 2018; Radford et al. 2021 (both ways).
    """
    every_a, every_b = _gathered(a, b, all_a, all_b, offset)
    with _float32(a):
        a, b, every_a, every_b = (normalise(x.float()) for x in (a, b, every_a, every_b))
        labels = torch.arange(offset, offset + len(a), device=a.device)
        forth = F.cross_entropy(scale * a @ every_b.T, labels)
        back = F.cross_entropy(scale * b @ every_a.T, labels)
        return (forth + back) / 2


def siglip(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    all_a: Tensor | None = None,
    all_b: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Sigmoid loss over all pairs: -log sigmoid(±(scale * cosine + bias)), + for a row's own partner.

    Args:
        a, b: (B, P) float, paired by row; normalised here.
        scale, bias: of the logits; Zhai et al. start from 10 and -10.
        all_a: not used, since the local rows of `a` meet all of `b`; here to be called like info_nce.
        all_b: (M, P) rows of all ranks and micro-batches; [offset, offset + B) are the local ones. None = b.
        offset: first local row.
    Returns:
        scalar float32, the sum over B * M pairs / B.
    Raises:
        ValueError: shapes do not fit.
    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """
    _, every_b = _gathered(a, b, all_b, all_b, offset)
    with _float32(a):
        logits = scale * normalise(a.float()) @ normalise(every_b.float()).T + bias
        own = torch.zeros_like(logits)
        own[:, offset : offset + len(a)].fill_diagonal_(2.0)
        return -F.logsigmoid(logits * (own - 1)).sum() / len(a)


def similarity_structure(
    a_tokens: Tensor, b_tokens: Tensor, *, intra: float = 1.0, cross: float = 1.0, real: Tensor | None = None
) -> Tensor:
    """Mean squared difference between token-token cosine matrices of a sample, student against teacher.

    With S(x, y) the (N, N) cosines between the tokens of x and y, it is
    intra * mean (S(a, a) - S(b, b))^2 + cross * mean (S(a, b) - S(b, b))^2.

    Args:
        a_tokens: (B, N, D) student tokens.
        b_tokens: (B, N, D') teacher tokens; D' may differ from D when cross = 0.
        intra, cross: weights of the two terms.
        real: (B, N) bool, at least one True a sample; each sample's mean is over the pairs of its real tokens. None =
            all are.
    Returns:
        scalar float32.
    Raises:
        ValueError: shapes do not fit.
    Source: the idea of ScaleEvent's similarity-matrix loss (PROTOCOLS §5); the squared difference is our
        choice.
    """
    if a_tokens.shape[:2] != b_tokens.shape[:2] or (cross and a_tokens.shape != b_tokens.shape):
        raise ValueError(
            f"token shapes {tuple(a_tokens.shape)} and {tuple(b_tokens.shape)} do not fit: batch and count "
            f"must "
            "agree, and the channels too unless cross = 0"
        )
    with _float32(a_tokens):
        a, b = normalise(a_tokens.float()), normalise(b_tokens.float())
        reference = b @ b.mT
        loss = a.new_zeros(())
        if intra:
            loss = loss + intra * _mean_of_pairs((a @ a.mT - reference).square(), real)
        if cross:
            loss = loss + cross * _mean_of_pairs((a @ b.mT - reference).square(), real)
        return loss


def normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / max(|x|, eps) along the last dimension, with a finite gradient at 0."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(eps * eps))


def _mean_of_pairs(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean over samples of the mean of (B, N, N) values over pairs of real tokens."""
    if real is None:
        return values.mean()
    pairs = real[:, :, None] & real[:, None]
    return (values.masked_fill(~pairs, 0.0).sum((1, 2)) / pairs.sum((1, 2))).mean()


def _float32(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _gathered(a: Tensor, b: Tensor, all_a: Tensor | None, all_b: Tensor | None, offset: int) -> tuple[Tensor, Tensor]:
    every_a, every_b = a if all_a is None else all_a, b if all_b is None else all_b
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"paired rows must be (B, P) both, got {tuple(a.shape)} and {tuple(b.shape)}")
    for every in (every_a, every_b):
        if every.shape[1] != a.shape[1] or not 0 <= offset <= len(every) - len(a):
            raise ValueError(
                f"rows [{offset}, {offset + len(a)}) of width {a.shape[1]} are not within the gathered "
                f"{tuple(every.shape)}"
            )
    return every_a, every_b
