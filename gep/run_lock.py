"""One run folder, one run: a lock that the system lets go of when its process ends, however that comes about."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gep import distributed

try:
    import fcntl
except ImportError:  # Windows: a second run is not noticed there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

# Held by this process. A lock of POSIX is the process's own: data workers, which outlive a killed run for some seconds,
# do not inherit it, and closing any other descriptor of the file would give it up.
_held: dict[Path, int] = {}


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """`claim` for a block of work, at whose end the folder is let go, an earlier claim's too."""
    claim(run_dir)
    try:
        yield
    finally:
        release(run_dir)


def claim(run_dir: Path) -> None:
    """Make a run folder and take it for this process until `release`; on every rank. Once more does nothing.

    Raises:
        ValueError: another process is working in the folder.
        OSError: the folder cannot be made or written.
    """
    problem: Exception | None = None
    if distributed.is_main():
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            problem = _take(run_dir.resolve())
        except OSError as error:
            words = f"cannot write to the run folder: {error.strerror}; choose another one"
            problem = OSError(error.errno, words, str(run_dir))
    problem = distributed.gather_objects(problem)[0]
    if problem is not None:
        raise problem


def release(run_dir: Path) -> None:
    """Let another process work in the folder; without a claim it does nothing."""
    descriptor = _held.pop(run_dir.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _take(run_dir: Path) -> ValueError | None:
    if fcntl is None or run_dir in _held:
        return None
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        return ValueError(
            f"{run_dir}: another run is working there (process {owner}); wait for it, end it, or choose another run "
            "folder"
        )
    except OSError as error:  # a file system without locks
        os.close(descriptor)
        print(f"warning: {run_dir} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)
        return None
    os.truncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
    _held[run_dir] = descriptor
    return None
