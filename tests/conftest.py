"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

# Two test processes share two cores: more threads than that would make each wait for the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import timm.layers
import torch


@pytest.fixture(autouse=True)
def usual_kernels() -> None:
    """Undoes `gep.cpu.use_fast_kernels`, which holds for the process, so that tests do not depend on their order."""
    torch.set_float32_matmul_precision("highest")
    timm.layers.set_fused_attn(True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real recordings (GEP_TEST_DATA, else ../shared/data beside the checkout), or a skip."""
    given = os.environ.get("GEP_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real recordings: {folder} is no folder; set GEP_TEST_DATA to the one that holds them")
    return folder
