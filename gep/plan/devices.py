"""Rates of the devices a run may be planned for, from public data sheets; of this machine's CPU, measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.nn.functional as F

MATMUL_SHARE = 0.6
"""Assumed share of the peak that large matrix products reach."""
TRAFFIC_SHARE = 0.8
"""Assumed share of the memory bandwidth that everything between the matrix products reaches."""
USABLE_SHARE = 0.94
"""Assumed share of the device's memory left by the driver's context, the libraries and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or one training process's share of this machine's CPU."""

    name: str
    """Key in DEVICES, or "cpu"."""
    bf16_tflops: float
    """Peak of dense bf16 products with fp32 accumulation [TFLOP/s], no sparsity."""
    fp32_tflops: float
    """Peak of fp32 products [TFLOP/s]; without TF32, which torch leaves off."""
    memory_gib: float
    """Memory [GiB]."""
    bandwidth_gbs: float
    """Memory bandwidth [GB/s]."""
    link_gbs: float
    """To the other devices of the machine, one direction [GB/s]: NVLink, or PCIe."""
    source: str
    """Where the figures are from."""

    def peak(self, precision: str) -> float:
        """Peak [FLOP/s] of products in a run's `train.precision`."""
        return 1e12 * (self.fp32_tflops if precision == "no" else self.bf16_tflops)

    @property
    def usable_bytes(self) -> float:
        """Bytes a training process may count on."""
        return USABLE_SHARE * self.memory_gib * 2**30


def _gpu(name: str, bf16: float, fp32: float, memory: float, bandwidth: float, link: float, source: str) -> Device:
    return Device(
        name=name,
        bf16_tflops=bf16,
        fp32_tflops=fp32,
        memory_gib=memory,
        bandwidth_gbs=bandwidth,
        link_gbs=link,
        source=source,
    )


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100-40", 312, 19.5, 40, 1555, 300, "NVIDIA A100 data sheet, SXM4 40 GB"),
        _gpu("a100-80", 312, 19.5, 80, 2039, 300, "NVIDIA A100 data sheet, SXM4 80 GB"),
        _gpu("h100", 989, 67, 80, 3350, 450, "NVIDIA H100 data sheet, SXM5 80 GB (bf16: half of the sparse figure)"),
        _gpu("h200", 989, 67, 141, 4800, 450, "NVIDIA H200 data sheet, SXM5 (bf16: half of the sparse figure)"),
        _gpu("b200", 2250, 75, 180, 7700, 900, "NVIDIA HGX B200 data sheet (bf16: half of the sparse figure)"),
        _gpu("l40s", 362, 91.6, 48, 864, 32, "NVIDIA L40S data sheet, PCIe 4.0 x16"),
        _gpu("l4", 121, 30.3, 24, 300, 32, "NVIDIA L4 data sheet, PCIe 4.0 x16 (bf16: half of the sparse figure)"),
        _gpu("rtx4090", 165.2, 82.6, 24, 1008, 32, "NVIDIA Ada GPU architecture white paper, RTX 4090"),
        _gpu("rtx3090", 71, 35.6, 24, 936, 32, "NVIDIA Ampere GA102 white paper, RTX 3090"),
    )
}
"""Devices by name; per device, not per machine."""

_CUDA_NAMES = (
    *(("A100", "a100-80"), ("H100", "h100"), ("H200", "h200"), ("B200", "b200"), ("L40S", "l40s")),
    *(("RTX 4090", "rtx4090"), ("RTX 3090", "rtx3090"), ("NVIDIA L4", "l4")),
)


def device_of(name: str) -> Device:
    """The device of that name; "cpu" is measured (0.3 s), "auto" is what is in this machine.

    Raises:
        ValueError: unknown name, or a GPU in this machine that is not in the table.
    """
    if name == "auto":
        name = present()
    if name == "cpu":
        return measure_cpu()
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not known; choose one of auto, cpu, {', '.join(DEVICES)}")
    return DEVICES[name]


def present() -> str:
    """Name of the device that a run on this machine would use.

    Raises:
        ValueError: a GPU that is not in the table.
    """
    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_name()
    for part, name in _CUDA_NAMES:
        if part in found:
            small = name == "a100-80" and torch.cuda.get_device_properties(0).total_memory < 50 * 2**30
            return "a100-40" if small else name
    raise ValueError(f"this machine's GPU ({found}) is not in the table; name a near one: {', '.join(DEVICES)}")


def measure_cpu(size: int = 768, repeats: int = 7) -> Device:
    """This process's CPU: rates of a square product in both precisions, and of GELU, medians under its present load.

    GELU stands for all that is between the products: on a CPU its arithmetic is slower than a copy.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        rates[dtype] = 2 * size**3 / _median(partial(torch.matmul, a, b), repeats) / 1e12
    values = torch.randn(4 * 2**20)
    bandwidth = 2 * 4 * len(values) / _median(lambda: F.gelu(values), repeats) / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Device(
        name="cpu",
        bf16_tflops=rates[torch.bfloat16],
        fp32_tflops=rates[torch.float32],
        memory_gib=psutil.virtual_memory().total / 2**30,
        bandwidth_gbs=bandwidth,
        link_gbs=bandwidth / 2,
        source=f"measured here, {torch.get_num_threads()} thread(s) of {cores} cores: "
        f"{1e3 * rates[torch.float32]:.0f} GFLOP/s fp32, {1e3 * rates[torch.bfloat16]:.0f} bf16, {bandwidth:.1f} GB/s",
    )


def _median(function: Callable[[], object], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
