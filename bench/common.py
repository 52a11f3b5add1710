"""What every benchmark prints and how it times: hardware, commit and command; then medians, ratios."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def print_header(title: str, packages: Sequence[str] = ("torch", "numpy", "numba")) -> None:
    """Prints the title, command, commit, hardware and package versions as Markdown."""
    script = Path(sys.argv[0])
    name = f"{script.parent.name}/{script.name}" if script.parent.name else script.name
    print(f"## {title}\n")
    print(f"- command: `python {' '.join([name, *sys.argv[1:]])}`")
    print(f"- commit: {commit()}")
    print(f"- hardware: {hardware()}")
    versions = ", ".join(f"{package} {_version(package)}" for package in packages)
    print(f"- Python {platform.python_version()}, {versions}, {torch.get_num_threads()} torch thread(s)\n")


def commit() -> str:
    """Short hash of the checkout's commit, marked when files differ from it."""
    try:
        run = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        short = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return f"{short} with local changes" if changed else short


def hardware() -> str:
    """Processor, cores this process may use, and GPU if there is one."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {cores} cores{gpu}"


def medians(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; rounds take them in turn, so that a busy spell hits all alike.

    Args:
        functions: name -> what to time; each is called once before, untimed (compilation, page faults).
        repeats: rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
