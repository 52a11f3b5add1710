"""LLM-EvRep's objective over the steps of a run, and how images are judged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from downstream.llm_evrep.config import LossConfig
from downstream.llm_evrep.fidelity import fidelity_loss
from downstream.llm_evrep.readers.base import TokenScores
from downstream.llm_evrep.semantic import NoSemantic, ScoreSemantic, SoftSemantic
from downstream.llm_evrep.task import EvRepTask, judge, summarise


class Grey(torch.nn.Module):
    """A generator of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(0.25))

    def forward(self, batch: dict) -> Tensor:
        return self.level.expand(len(batch["key"]), 3, 4, 4)


def test_the_objective_by_step() -> None:
    class Known(NoSemantic):
        def loss(self, images: Tensor, texts: list[str], *, keys: list[str], step: int) -> dict[str, Tensor]:
            assert texts == ["a dog", "a cat"] and keys == ["x", "y"]
            return {"loss": 3 * images.mean(), "jaccard": images.new_tensor(0.5)}

    semantic = torch.nn.Module()
    semantic.loss = Known().loss
    loss = LossConfig(semantic=2.0, fidelity=10.0, semantic_start=1, semantic_warmup=2)
    task = EvRepTask(Grey(), loss, semantic, {"x": "a dog", "y": "a cat"})
    frames = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"key": ["x", "y"], "image": frames}
    edges = fidelity_loss(torch.full((2, 3, 4, 4), 0.25), frames.float() / 255).item()
    found = []
    for _ in range(4):
        context = task.context([batch])
        values = [task(batch, context=context, index=index)["loss"].item() for index in range(2)]
        assert values[0] == values[1], "micro-batches of a step have one weight"
        found.append(values[0])
    assert found == pytest.approx([10 * edges + weight * 0.75 for weight in (0, 1, 2, 2)])
    with pytest.raises(ValueError, match="unread could not be read"):
        task({"key": ["x", "unread"], "image": frames}, context={"step": 5})


def test_judging_by_hand() -> None:
    images, frames = torch.rand(3, 3, 6, 6), torch.randint(0, 256, (3, 3, 6, 6), dtype=torch.uint8)
    rows = judge(images, frames, ["a red dog", "dogs", ""], ["red dogs", "a cat and a dog", "the"])
    assert rows["jaccard"].tolist() == [1, 0.5, 1] and rows["agreement"].tolist() == [1, 0, 1]
    each = [fidelity_loss(images[i : i + 1], frames[i : i + 1]).item() for i in range(3)]
    assert rows["sobel_error"].tolist() == pytest.approx(each)
    summary = summarise(rows)
    assert summary["jaccard"] == pytest.approx(2.5 / 3) and summary["agreement"] == pytest.approx(200 / 3)
    assert set(judge(images, frames, [], [])) == {"sobel_error"}


def test_the_reader_is_asked_in_its_own_precision() -> None:
    class Precise:
        name, has_weights = "precise", True

        def token_log_probs(self, x: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
            assert not torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
            return [TokenScores([(0, 3)], -image.mean()[None]) for image in x]

        def describe(self, x: Tensor, prompt: str, *, on_answer: object = None) -> list[str]:
            assert not torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
            return ["dog"] * len(x)

    images, texts, keys = torch.rand(2, 3, 4, 4), ["dog", "dog"], ["a", "b"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        soft = SoftSemantic(Precise(), "?").loss(images, texts, keys=keys, step=0)
        score = ScoreSemantic(Precise(), "?").loss(images, texts, keys=keys, step=0)
    p = (-images.mean(dim=(1, 2, 3))).exp()
    assert soft["loss"].item() == pytest.approx(1 - (p / (2 - p)).mean().item(), rel=1e-5), "J = p / (1 + 1 - p)"
    assert score["jaccard"] == 1
