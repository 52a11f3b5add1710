"""The weights of the step with the best validation score, kept on disk as they are found."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from torch import nn

from gep import checkpoint, distributed, export


class Best:
    """run/best: the weights of the best step so far; whole or as before, whenever the run is killed.

    A resumed run finds there what the interrupted one had; where it takes the same steps again, it finds the same
    scores, none of which is better.

    Args:
        module: what is trained, the same object on every call.
        run_dir: the run's folder.
        higher: whether more is better.
    """

    def __init__(self, module: nn.Module, run_dir: Path, *, higher: bool):
        self.module, self.folder, self.higher = module, run_dir / "best", higher
        self.step, self.score = 0, math.nan
        started = bool(distributed.gather_objects(checkpoint.find(run_dir))[0])
        if started and (self.folder / export.CONFIG).is_file():
            found, _ = export.load_folder(self.folder, "best")
            self.step, self.score = found["step"], math.nan if found["score"] is None else found["score"]
        distributed.barrier()
        if not started and distributed.is_main():  # of a run that begins anew
            shutil.rmtree(self.folder, ignore_errors=True)
        distributed.barrier()

    def offer(self, step: int, score: float) -> bool:
        """Keeps the module's weights if their score is better than any before; on every rank. NaN is worst."""
        sign = 1 if self.higher else -1
        if self.step and not (sign * score > sign * self.score or (math.isnan(self.score) and not math.isnan(score))):
            return False
        self.step, self.score = step, score
        # Sharded parameters are made whole by all ranks together.
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in self.module.state_dict().items()
        }
        failure = None
        if distributed.is_main():
            try:
                settings = export.plain({"step": step, "score": float(score)})
                export.save_folder(self.folder, kind="best", config=settings, state=state, card="# Best step\n")
            except OSError as error:
                failure = str(error)
        failure = distributed.gather_objects(failure)[0]
        if failure is not None:
            raise OSError(failure)
        return True

    def restore(self) -> None:
        """Puts the best step's weights back into the module; on every rank."""
        _, state = export.load_folder(self.folder, "best")
        export.load_strict(self.module, state, source=str(self.folder))
