"""A sample of `make faults`: a few kills, and the faults that need processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import workers

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = "stage 1: checkpoint|export over another|two runs|NaN in data|disk full: export|read-only: shards"


def test_a_few_kills_and_faults():
    command = [sys.executable, "-m", "tests.faults", "--kills", "4", "--match", SAMPLE]
    done = subprocess.run(
        command, cwd=ROOT, env=workers.environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it should be") == 4 and "4 other faults, 0 not" in done.stdout
    (total,) = [line.split() for line in done.stdout.splitlines() if line.startswith("all ")]
    assert total == ["all", "4", "4", "4", "0"]
