"""What ends a run early: a non-finite loss or gradient before it reaches the weights, and a polite signal."""

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gep import distributed

_SHOWN_KEYS = 64
_MAX_SKIPPED_IN_A_ROW = 20


class NonFiniteError(FloatingPointError):
    """A loss or gradient norm was NaN or infinite; the weights are those of the step before."""


class FiniteWatch:
    """Looks at every step's losses and gradient norm before the optimiser moves.

    Immediate: the host reads the verdict each step (CPU, fp16, sharded optimisers). Deferred (CUDA): the
    verdict stays on the device in a sticky flag that the fused AdamW reads as `found_inf`, so that from the
    first bad step on no weight changes, and the host learns of it at the next `confirm`, from the keys kept
    since the last one.

    Args:
        device: where the losses live.
        optimizer: the innermost torch optimiser; in deferred mode a fused one.
        deferred: which of the two ways.
        fp16: gradient overflow is then the loss scaler's business; only many skipped steps in a row are an
            error.
    """

    def __init__(self, device: torch.device, optimizer: Any, *, deferred: bool, fp16: bool = False) -> None:
        self.deferred = deferred
        self.stop_voted = False
        self._fp16 = fp16
        self._skipped = 0
        self._since: dict[int, tuple[Tensor, Tensor, list[list[str]]]] = {}
        if deferred:
            self._flag = torch.zeros((), device=device)
            self._first = torch.full((), -1, dtype=torch.int64, device=device)
            optimizer.found_inf = self._flag

    def observe(
        self, step: int, losses: Sequence[Tensor], norm: Tensor, keys: list[list[str]], *, stop: bool = False
    ) -> None:
        """Judge a step before the optimiser takes it.

        Args:
            step: number of the step, counted from 1 as in metrics.jsonl.
            losses: scalar losses of this rank's micro-batches.
            norm: scalar global gradient norm, the same on all ranks.
            keys: sample keys of each micro-batch.
            stop: this rank was asked to stop; in immediate mode all ranks learn of it in the same message.
        Raises:
            NonFiniteError: immediate mode, on all ranks alike.
        """
        values = torch.stack([*losses, norm.to(losses[0].device)]).detach().float()
        finite = torch.isfinite(values)
        if not self.deferred:
            loss_bad, norm_bad = not bool(finite[:-1].all()), not bool(finite[-1])
            verdict = torch.tensor([float(loss_bad or (norm_bad and not self._fp16)), float(stop)])
            bad, stop_voted = distributed.max_over_ranks(verdict).tolist()
            self.stop_voted = bool(stop_voted)
            if bad:
                self._raise(step, values, keys)
            self._skipped = self._skipped + 1 if norm_bad else 0
            if self._skipped >= _MAX_SKIPPED_IN_A_ROW:
                raise NonFiniteError(
                    f"step {step}: fp16 gradients overflowed {self._skipped} steps in a row at every loss "
                    "scale; use train.precision=bf16, or lower optim.lr"
                )
            return
        bad_now = distributed.max_over_ranks(1.0 - finite.all().float())
        self._first.copy_(torch.where((self._flag == 0) & (bad_now > 0), step, self._first))
        self._flag.copy_(torch.maximum(self._flag, bad_now))
        self._since[step] = (values, finite, keys)

    def confirm(self) -> None:
        """Raise if any step since the last call was bad. One host sync in deferred mode, free otherwise.

        Raises:
            NonFiniteError: on all ranks alike.
        """
        if not self.deferred:
            return
        first = int(self._first.item())
        if first >= 0:
            values, _, keys = self._since[first]
            self._raise(first, values, keys)
        self._since.clear()

    def _raise(self, step: int, values: Tensor, keys: list[list[str]]) -> None:
        *losses, norm = values.tolist()
        reports = distributed.gather_objects(list(zip(losses, keys, strict=True)))
        micro_batches = [pair for report in reports for pair in report]
        guilty = [pair for pair in micro_batches if not torch.isfinite(torch.tensor(pair[0]))]
        what = "loss" if guilty else "gradient norm"
        names = [name for _, batch_keys in (guilty or micro_batches) for name in batch_keys]
        shown = ", ".join(names[:_SHOWN_KEYS]) or "(the batches carry no 'key')"
        more = f", ... {len(names)} in all" if len(names) > _SHOWN_KEYS else ""
        mean = sum(loss for loss, _ in micro_batches) / len(micro_batches)
        raise NonFiniteError(
            f"non-finite {what} at step {step} (loss {mean:g}, gradient norm {norm:g}); the weights and the "
            f"checkpoints before it are untouched. Samples: {shown}{more}. Look at these, or lower optim.lr, "
            "lengthen optim.warmup_steps, set optim.clip_norm or train.precision=no"
        )


class StopSignal:
    """Inside the `with`, the first SIGTERM or SIGINT only sets `requested`; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested, self.name = True, signal.Signals(number).name
        self._restore()
        if distributed.is_main():
            sys.stderr.write(f"\n{self.name}: finishing this step and saving; once more ends at once\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
