"""`gep app`: from the command line to a page that is served here."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any


def add_command(commands: argparse._SubParsersAction) -> None:
    """The command's options."""
    app = commands.add_parser("app", help="a page in the browser: play recordings, see what models make of them")
    app.add_argument("models", nargs="*", metavar="MODEL", help="exports of any kind, or Hub ids")
    app.add_argument("--images", type=Path, metavar="DIR", help="images that windows are compared with")
    app.add_argument("--teacher", default="", metavar="SPEC", help="--images: the image model; default: as exported")
    app.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 = all (%(default)s)")
    app.add_argument("--port", type=int, default=7860, help="0 = any (%(default)s)")
    app.add_argument("--max-mb", type=int, default=500, help="largest file that may be dropped (%(default)s)")
    app.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    # All three are read when gradio or huggingface_hub is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with tempfile.TemporaryDirectory(prefix="gep-app-") as dropped:
        os.environ["GRADIO_TEMP_DIR"] = dropped
        try:
            import gradio  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError('the page needs Gradio: pip install "gep[app]"') from error
        from gep.app.page import build, serve

        if arguments.max_mb < 1:
            raise ValueError(f"--max-mb {arguments.max_mb}: give at least 1")
        if arguments.teacher and arguments.images is None:
            raise ValueError("--teacher has no effect without --images")
        if arguments.images is not None and not arguments.models:
            raise ValueError(f"--images {arguments.images} needs an encoder: give the export of stage 1 or 2")
        page = build(*_loaded(arguments)) if arguments.models else build()
        try:
            served = serve(page, host=arguments.host, port=arguments.port, max_mb=arguments.max_mb)
        except OSError as error:
            raise ValueError(
                f"cannot listen at --host {arguments.host} --port {arguments.port}: choose another port; 0 = any"
            ) from error
        print(f"{served}  (Ctrl+C ends it)", file=sys.stderr, flush=True)
        threading.Event().wait()


def _loaded(arguments: argparse.Namespace) -> tuple[Any, int, int]:
    import torch

    from gep.app.models import load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(arguments.models, images=arguments.images, teacher=arguments.teacher, device=device)
