"""A dense model with the loss, the rows and the tables of its problem: what `engine.fit` trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from downstream.dense.features import FeatureMaps
from downstream.dense.model import DenseModel
from gep.data.listing import Listing
from gep.data.sampler import Batch


class Problem(Protocol):
    """What segmentation and depth say of themselves; a frozen dataclass in each task.py."""

    @property
    def name(self) -> Literal["segmentation", "depth"]: ...

    @property
    def target(self) -> Literal["mask", "depth"]:
        """The batch's key."""

    @property
    def score(self) -> str:
        """Name of the summary's number that chooses the best step."""

    @property
    def higher(self) -> bool:
        """Whether more of it is better."""

    @property
    def num_outputs(self) -> int:
        """Channels of the head's output."""

    @property
    def task(self) -> dict[str, Any]:
        """What an export has to know of it, as JSON (`DenseModel.task`)."""

    def loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """{"loss": scalar, …} of (B, num_outputs, H, W): a mean over samples, however they are spread over ranks."""

    def rows(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Named tensors of a row a sample, for `gep.evaluate.collect`."""

    def summary(self, rows: Mapping[str, Tensor], listing: Listing) -> dict[str, Any]:
        """Nested tables of a whole set's rows; numbers at the top level are logged."""

    def table(self, summary: Mapping[str, Any]) -> str:
        """The summary for people, with the units and cut-offs that belong to its numbers."""

    def merge(self, outputs: Sequence[Tensor]) -> Tensor:
        """One output (B, num_outputs, H, W) from several predictions of the same view, for test-time augmentation."""


class DenseTask(nn.Module):
    """A dense model and its problem.

    Args:
        model: features and head; parts without a trainable parameter stay in evaluation mode.
        problem: loss and metrics.
    """

    def __init__(self, model: DenseModel, problem: Problem):
        super().__init__()
        self.model, self.problem = model, problem

    def train(self, mode: bool = True) -> DenseTask:
        """As for any module, but frozen parts get no dropout and no stochastic depth."""
        super().train(mode)
        for part in (self.model.features.encoder, self.model.features.backbone):
            if part is not None and not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss", …} of a batch with its target."""
        return self.problem.loss(self.model.from_levels(self.maps(batch)), batch)

    def maps(self, batch: Batch) -> FeatureMaps:
        """The features of a batch: computed, or those that it carries as "maps"."""
        if "maps" in batch:
            maps = batch["maps"]
            return FeatureMaps(list(maps["levels"]), tuple(maps["size"]), tuple(maps["padded"]))
        return self.model.features(self.model.features.frames(batch), batch["t_us"][..., 1])

    def predict(self, batch: Batch, *, tta: bool = False) -> Tensor:
        """Output (B, num_outputs, H, W) of a batch, with `tta` merged with that of the mirrored input."""
        if not tta:
            return self.model.from_levels(self.maps(batch))
        frames, t_us = self.model.features.frames(batch), batch["t_us"][..., 1]
        mirrored = self.model.predict_frames(frames.flip(-1), t_us)
        return self.problem.merge([self.model.predict_frames(frames, t_us), mirrored.flip(-1)])
