"""A folder made beside its place and moved in at one stroke; what an ended process left of that is put right."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

_AT_FDCWD, _EXCHANGE = -100, 2  # of Linux's renameat2


def beside(folder: Path) -> Path:
    """A new empty folder for what is to take the place of `folder`; leftovers of ended processes are removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _put_right(folder)
    made = Path(tempfile.mkdtemp(prefix=f"{_prefix(folder)}new-{_me()}-", dir=folder.parent))
    made.chmod(0o755)  # mkdtemp's 0700 would follow it to where others read it
    return made


def swap(new: Path, folder: Path) -> None:
    """Move `new` to `folder`; what was there lies at `new` afterwards, or is gone.

    At no moment is there nothing at `folder`, except on systems that cannot exchange two names.
    """
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        old = Path(tempfile.mkdtemp(prefix=f"{_prefix(folder)}old-{_me()}-", dir=folder.parent))
        os.rename(folder, old)  # onto the empty folder just made
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Whether the system exchanged the two names in one step."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    return call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _EXCHANGE) == 0


def _put_right(folder: Path) -> None:
    """Brings back what was killed between two renames, and removes what was killed before."""
    for kind in ("old", "new"):
        start = f"{_prefix(folder)}{kind}-{socket.gethostname()}-"
        for left in folder.parent.glob(f"{glob.escape(start)}*"):
            process = left.name.removeprefix(start).split("-")[0]
            if not process.isdigit() or _is_running(int(process)):
                continue
            if kind == "old" and not folder.exists() and any(left.iterdir()):
                os.rename(left, folder)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _prefix(folder: Path) -> str:
    return f".{folder.name}."


def _me() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
