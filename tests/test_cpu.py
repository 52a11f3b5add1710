"""Kernels on CPUs: chosen by the machine, and as exact as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gep import cpu


@pytest.fixture(autouse=True)
def judged_anew() -> Iterator[None]:
    cpu._is_slow_in_mkl.cache_clear()
    yield
    cpu._is_slow_in_mkl.cache_clear()


def test_products_keep_float32s_precision() -> None:
    cpu.use_fast_kernels()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 96, generator=generator, requires_grad=True)
    weight = torch.randn(384, 96, generator=generator, requires_grad=True)
    out = torch.nn.functional.linear(x, weight)
    out.square().sum().backward()
    exact = x.detach().double() @ weight.detach().double().T
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad.double(), 2 * exact @ weight.detach().double(), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(weight.grad.double(), 2 * exact.T @ x.detach().double(), rtol=1e-5, atol=1e-2)


def test_nothing_changes_where_products_would_lose_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(cpu, "_stays_exact", lambda: False)
    assert not cpu.use_fast_kernels() and torch.get_float32_matmul_precision() == "highest"


def test_nothing_changes_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu.use_fast_kernels() and torch.get_float32_matmul_precision() == "highest"
