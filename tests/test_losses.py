"""Losses against float64 NumPy formulas and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gep.losses import info_nce, regression, siglip, similarity_structure


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    top = logits.max(1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    return float((log_sum - logits[np.arange(len(logits)), labels]).mean())


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g), torch.randn(*shape, generator=g) * 1.7 + 0.3


def check_gradient(function, x: torch.Tensor, step: float = 1e-2, tolerance: float = 2e-3) -> None:
    """The gradient along three random directions against a central difference."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x)
    g = torch.Generator().manual_seed(7)
    for _ in range(3):
        d = torch.randn(x.shape, generator=g)
        d /= d.norm()
        with torch.no_grad():
            numeric = (function(x + step * d) - function(x - step * d)) / (2 * step)
        assert abs(float(numeric - (gradient * d).sum())) < tolerance


def reference_error(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    if kind == "mse":
        return ((a - b) ** 2).mean(-1)
    if kind == "cosine":
        return 1 - (unit(a) * unit(b)).sum(-1)
    e = np.abs(a - b)
    return np.where(e < 1, 0.5 * e**2, e - 0.5).mean(-1)


@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1"])
def test_regression_is_the_formula(kind):
    a, b = pair(3, 5, 7)
    error = reference_error(a.double().numpy(), b.double().numpy(), kind)
    assert regression(a, b, kind=kind).item() == pytest.approx(error.mean(), rel=1e-5)
    weight = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    w = weight.double().numpy()
    got = regression(a, b, kind=kind, weight=weight).item()
    assert got == pytest.approx((error * w).sum() / w.sum(), rel=1e-5)
    got = regression(a, b, kind=kind, weight=weight, denominator=11.0).item()
    assert got == pytest.approx((error * w).sum() / 11, rel=1e-5)
    check_gradient(lambda x: regression(x, b, kind=kind, weight=weight), a)


def test_masked_tokens_do_not_matter_even_when_nan():
    a, b = pair(2, 4, 3)
    keep = torch.tensor([[True, False, True, True], [False, True, True, False]])
    expected = regression(a[keep], b[keep], kind="smooth_l1")
    a = a.masked_fill(~keep[..., None], float("nan")).requires_grad_()
    loss = regression(a, b, kind="smooth_l1", weight=keep)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(a.grad).all() and (a.grad[~keep] == 0).all()
    assert regression(a, b, weight=torch.zeros(2, 4)).item() == 0


def test_global_denominator_makes_parts_add_up():
    a, b = pair(6, 4, 3)
    weight = (torch.rand(6, 4, generator=torch.Generator().manual_seed(2)) > 0.4).float()
    whole = regression(a, b, weight=weight)
    count = weight.sum() / 2  # two parts that are averaged
    parts = [regression(a[i], b[i], weight=weight[i], denominator=count) for i in (slice(1), slice(1, 6))]
    assert ((parts[0] + parts[1]) / 2).item() == pytest.approx(whole.item(), rel=1e-6)


def test_info_nce_is_the_formula():
    a, b = pair(6, 5)
    x, y = unit(a.double().numpy()), unit(b.double().numpy())
    labels = np.arange(6)
    expected = (cross_entropy(7.0 * x @ y.T, labels) + cross_entropy(7.0 * y @ x.T, labels)) / 2
    assert info_nce(a, b, 7.0).item() == pytest.approx(expected, rel=1e-5)
    check_gradient(lambda z: info_nce(z, b, 3.0), a)
    check_gradient(lambda z: info_nce(a, b, z), torch.tensor(3.0))


def test_info_nce_of_shards_is_that_of_the_whole_batch():
    a, b = pair(6, 5)
    a, b = a.requires_grad_(), b.requires_grad_()
    whole = info_nce(a, b, 7.0)
    expected = torch.autograd.grad(whole, (a, b))
    shards = [info_nce(a[i : i + 2], b[i : i + 2], 7.0, all_a=a, all_b=b, offset=i) for i in (0, 2, 4)]
    mean = sum(shards) / 3
    assert mean.item() == pytest.approx(whole.item(), rel=1e-6)
    for got, want in zip(torch.autograd.grad(mean, (a, b)), expected):
        torch.testing.assert_close(got, want)


def test_siglip_is_the_formula_and_shards_add_up():
    a, b = pair(6, 5)
    logits = 4.0 * unit(a.double().numpy()) @ unit(b.double().numpy()).T - 3.0
    sign = 2 * np.eye(6) - 1
    expected = np.log1p(np.exp(-sign * logits)).sum() / 6
    assert siglip(a, b, 4.0, -3.0).item() == pytest.approx(expected, rel=1e-5)
    shards = [siglip(a[i : i + 3], b[i : i + 3], 4.0, -3.0, all_b=b, offset=i) for i in (0, 3)]
    assert (sum(shards) / 2).item() == pytest.approx(expected, rel=1e-5)
    check_gradient(lambda z: siglip(z, b, 4.0, -3.0), a)


def test_similarity_structure_is_the_formula():
    a, b = pair(2, 5, 4)
    x, y = unit(a.double().numpy()), unit(b.double().numpy())
    same, cross, reference = (np.einsum("bnd,bmd->bnm", left, right) for left, right in ((x, x), (x, y), (y, y)))
    intra_term, cross_term = ((same - reference) ** 2).mean(), ((cross - reference) ** 2).mean()
    got = similarity_structure(a, b, intra=0.5, cross=2.0).item()
    assert got == pytest.approx(0.5 * intra_term + 2.0 * cross_term, rel=1e-5)
    assert similarity_structure(b, b).item() == pytest.approx(0, abs=1e-10)
    # The intra term alone sees only angles between a sample's tokens: a rotation of the space changes
    # nothing.
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    assert similarity_structure(b @ turn, b, cross=0).item() == pytest.approx(0, abs=1e-9)
    assert similarity_structure(b @ turn, b, intra=0).item() > 1e-2
    check_gradient(lambda z: similarity_structure(z, b), a)
    assert similarity_structure(torch.randn(2, 5, 9), b, cross=0) > 0  # other width: intra only


def test_float32_under_autocast_and_at_zero():
    a, b = pair(6, 5)
    want = [
        regression(a, b),
        info_nce(a, b, 7.0),
        siglip(a, b, 4.0, -3.0),
        similarity_structure(a[None], b[None]),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [
            regression(a, b),
            info_nce(a, b, 7.0),
            siglip(a, b, 4.0, -3.0),
            similarity_structure(a[None], b[None]),
        ]
    assert [x.dtype for x in got] == [torch.float32] * 4 and got == want
    zero = torch.zeros(3, 4, requires_grad=True)
    loss = regression(zero, torch.ones(3, 4), kind="cosine") + info_nce(zero, F.normalize(pair(3, 4)[0]), 5.0)
    loss.backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: regression(torch.zeros(2, 3), torch.zeros(2, 4)), "differ in shape"),
        (lambda: regression(torch.zeros(2, 3), torch.zeros(2, 3), kind="l1"), "mse, cosine, mse_cosine, smooth_l1"),
        (lambda: info_nce(torch.zeros(2, 3), torch.zeros(3, 3), 1.0), "both"),
        (
            lambda: info_nce(*pair(4, 3), 1.0, all_a=torch.zeros(6, 3), all_b=torch.zeros(6, 3), offset=3),
            "[3, 7)",
        ),
        (lambda: similarity_structure(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)), "cross = 0"),
    ],
)
def test_errors_name_the_fault(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
