"""Training LLM-EvGen: L = λ · (1 − Jaccard of the words) + γ · (MSE of the Sobel maps), and how its images are judged.

Source: LLM-EvRep, arXiv 2502.14273, Eq. 3-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from downstream.llm_evrep.config import Estimator, LossConfig
from downstream.llm_evrep.fidelity import fidelity_loss, sobel_magnitude
from downstream.llm_evrep.readers.base import Reader
from downstream.llm_evrep.semantic import NoSemantic, ScoreSemantic, SoftSemantic
from downstream.llm_evrep.words import jaccard, words
from gep.data.sampler import Batch
from gep.models.teacher import as_float

Semantic = NoSemantic | SoftSemantic | ScoreSemantic


class EvRepTask(nn.Module):
    """The generator, the frozen reader's view of its images, and the objective.

    Args:
        model: `EvRep`: batch -> images (B, 3, H, W) in [0, 1].
        loss: terms and weights.
        semantic: the estimator of the semantic term.
        descriptions: sample key -> what the reader said of the unaugmented RGB frame.

    Attributes:
        progress: what a checkpoint has to hold beside the weights; register it with the accelerator.
    """

    def __init__(
        self, model: nn.Module, loss: LossConfig, semantic: Semantic, descriptions: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.semantic = semantic
        self.descriptions = dict(descriptions or {})
        self.progress = Progress(semantic)

    def context(self, micro_batches: list[Batch]) -> dict[str, int]:
        """The number of the step that begins; called by the engine once a step."""
        self.progress.step += 1
        return {"step": self.progress.step - 1}

    def forward(self, batch: Batch, context: dict[str, int] | None = None, index: int = 0) -> dict[str, Tensor]:
        """Losses of one micro-batch.

        Args:
            batch: `gep.data.paired.collate` of paired samples.
            context: what `context` returned for this step; index: place of this micro-batch in it.
        Returns:
            "loss" and what it is made of, scalars; "jaccard" where the reader was asked, of the estimator's kind.
        """
        step = (context or {"step": 0})["step"]
        images = self.model(batch)
        total = images.sum() * 0
        logged: dict[str, Tensor] = {}
        if self.loss.fidelity:
            logged["fidelity"] = fidelity_loss(images, as_float(batch["image"]))
            total = total + self.loss.fidelity_weight(step) * logged["fidelity"]
        weight = self.loss.semantic_weight(step)
        if weight and not isinstance(self.semantic, NoSemantic):
            found = self.semantic.loss(images, self._texts(batch["key"]), keys=batch["key"], step=step)
            total = total + weight * found["loss"]
            if "baseline" in found:  # its gradient is its own; the objective's value has no part of it
                total = total + found["baseline"] - found["baseline"].detach()
            logged |= {name: value for name, value in found.items() if name != "loss"}
        else:  # parameters without a gradient would make other ranks wait
            total = total + sum(parameter.sum() * 0 for parameter in self.semantic.parameters())
        return {"loss": total, **{name: value.detach() for name, value in logged.items()}}

    def _texts(self, keys: list[str]) -> list[str]:
        missing = [key for key in keys if key not in self.descriptions]
        if missing:
            raise ValueError(
                f"{missing[0]} could not be read when the frames were described, and can now: start the run again"
            )
        return [self.descriptions[key] for key in keys]


class Progress:
    """Steps taken and images shown to the reader, equal on all ranks, for checkpoints."""

    def __init__(self, semantic: nn.Module) -> None:
        self.step = 0
        self._semantic = semantic

    @property
    def shown(self) -> int:
        """Perturbed images that the reader was shown, over all ranks."""
        return getattr(self._semantic, "shown", 0)

    def state_dict(self) -> dict[str, int]:
        """For checkpoints."""
        return {"step": self.step, "shown": self.shown}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up a saved state."""
        self.step = state["step"]
        if isinstance(self._semantic, ScoreSemantic):
            self._semantic.shown = state["shown"]


def build_semantic(
    estimator: Estimator, loss: LossConfig, reader: Reader | None, prompt: str, *, seed: int
) -> Semantic:
    """The estimator of `LossConfig.resolve` with its settings.

    Args:
        estimator: "soft", "score" or "none".
        loss: settings.
        reader: needed unless "none".
        prompt: what it is asked.
        seed: of soft's views and score's perturbations.
    """
    if estimator == "none":
        return NoSemantic()
    assert reader is not None
    if estimator == "soft":
        return SoftSemantic(reader, prompt, text=loss.soft_text, form=loss.soft_form, views=loss.soft_views, seed=seed)
    return ScoreSemantic(
        reader, prompt, samples=loss.score_samples, sigma=loss.score_sigma, budget=loss.score_budget, seed=seed
    )


@torch.no_grad()
def judge(images: Tensor, frames_rgb: Tensor, answers: list[str], truths: list[str]) -> dict[str, Tensor]:
    """What an evaluation keeps of each sample.

    Args:
        images: (B, 3, H, W) float in [0, 1]; frames_rgb: the paired frames, uint8 or float.
        answers, truths: descriptions of the two; both empty = no reader.
    Returns:
        name -> (B,) float32 on the images' device: sobel_error, and with answers jaccard and agreement (0 or 1).
    """
    error = (sobel_magnitude(images) - sobel_magnitude(as_float(frames_rgb))).square().mean(dim=(1, 2, 3))
    rows = {"sobel_error": error.float()}
    if answers:
        pairs = [(words(a), words(b)) for a, b in zip(answers, truths, strict=True)]
        rows["jaccard"] = torch.tensor([jaccard(a, b) for a, b in pairs], device=images.device)
        rows["agreement"] = torch.tensor([float(a == b) for a, b in pairs], device=images.device)
    return rows


def summarise(rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means of `judge`'s rows over a set: sobel_error, jaccard in [0, 1], agreement [% with the same words]."""
    found = {name: values.double().mean().item() for name, values in rows.items()}
    return found | ({"agreement": 100 * found["agreement"]} if "agreement" in found else {})
