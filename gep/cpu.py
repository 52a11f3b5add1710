"""Which kernels PyTorch computes with on a CPU, where its own choice is the slow one."""

from __future__ import annotations

import functools
from pathlib import Path

import timm.layers
import torch


def use_fast_kernels() -> bool:
    """Has matrix products of float32 computed by oneDNN on AMD's CPUs with AVX-512; returns whether it does.

    PyTorch gives them to MKL, which leaves AVX-512 unused on AMD's: products of a small ViT then take twice as long.
    oneDNN may be asked by allowing bfloat16 products, which it has no kernels for without AMX and computes in float32.
    Of attention, timm's own two products are then faster than PyTorch's fused kernel, which loses by that setting.
    Everywhere else nothing is changed. The choice depends on the machine alone, so that a run's numbers do not change.
    Models are to be built after it: timm's attention reads its switch when it is made.
    """
    if not _is_slow_in_mkl():
        return False
    torch.set_float32_matmul_precision("medium")
    timm.layers.set_fused_attn(False)
    return True


@functools.cache
def _is_slow_in_mkl() -> bool:
    cpu = Path("/proc/cpuinfo")
    if torch.cuda.is_available() or not cpu.exists() or "AuthenticAMD" not in cpu.read_text():
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    return capability == "AVX512" and not amx and torch.backends.mkldnn.is_available() and _stays_exact()


def _stays_exact() -> bool:
    """Whether products allowed to lose precision keep float32's."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        return bool(((a @ b).double() - a.double() @ b.double()).abs().max() < 1e-3)
    finally:
        torch.set_float32_matmul_precision(before)
