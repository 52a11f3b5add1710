"""Programs that tests start as processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's traces, on the CPU, one thread."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("ACCELERATE_")}
    return {**env, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def start(script: str, *args: str, **extra: str) -> subprocess.Popen:
    """Start a script of this folder; stderr goes into stdout."""
    command = [sys.executable, str(HERE / script), *args]
    return subprocess.Popen(
        command, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_ranks(script: str, *args: str, count: int = 2) -> list[subprocess.Popen]:
    """Start a script as the ranks of one process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    local = {"LOCAL_WORLD_SIZE": str(count)}
    return [start(script, *args, RANK=str(r), LOCAL_RANK=str(r), **shared, **local) for r in range(count)]


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[str]:
    """Wait for processes and return what they printed; end them all if one takes too long."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
