"""Both stages' tasks: the objective under accumulation, frozen parts, metrics against hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gep.data.paired import collate
from gep.data.sequence import EVENT, IMAGE, collate_sequences, lay_out
from gep.events.represent import Histogram
from gep.events.types import EventBatch, Events
from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM, ImageModel
from stage1_align.task import AlignLossConfig, Stage1Task, evaluate_alignment, layer_normalise
from stage2_autoregress.task import NextLossConfig, Stage2Task, evaluate_prediction
from stage2_autoregress.tokens import FrozenTokens

WINDOWS = 2


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> FrozenVFM:
    torch.manual_seed(0)
    model = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789"))
    return FrozenVFM.from_spec(f"export:{model.save(tmp_path_factory.mktemp('teacher') / 'export')}")


def encoder() -> EventEncoder:
    torch.manual_seed(1)
    return EventEncoder("nano", in_chans=2, img_size=(36, 36), head_dim=96)


def samples(count: int, windows: int = WINDOWS) -> list[dict]:
    rng = np.random.default_rng(4)
    made = []
    for index in range(count):
        bounds = np.array([[k * 100, (k + 1) * 100] for k in range(windows)])
        parts = [
            Events.from_arrays(
                np.sort(rng.integers(*edges, 60)), rng.integers(0, 36, 60), rng.integers(0, 36, 60),
                rng.integers(0, 2, 60), height=36, width=36,
            )
            for edges in bounds
        ]  # fmt: skip
        image = rng.integers(0, 255, (3, 36, 36)).astype(np.uint8)
        made.append({"key": f"s{index}", "events": parts, "t_us": bounds, "label": index % 10, "image": image})
    return made


def sequences(count: int, kinds: tuple[str, ...] = ("image_last",)) -> list[dict]:
    made = []
    for index, sample in enumerate(samples(count, windows=3)):
        pair = np.zeros(3, dtype=np.int64)
        frames = lay_out(kinds[index % len(kinds)], sample["t_us"], pair, sample["t_us"][-1:, 1])
        made.append({**sample, "images": sample["image"][None], "pair": pair, **frames})
    return made


def gradients(task: torch.nn.Module, parts: list[dict], joined: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients as the engine makes them: the mean over micro-batches, with the step's context."""
    task.zero_grad()
    context = task.context(parts)
    total = 0.0
    for index, part in enumerate(parts):
        loss = (task(part) if context is None else task(part, context=context, index=index))["loss"]
        (loss / len(parts)).backward()
        total += loss.item() / len(parts)
    return total, {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["info_nce", "siglip"])
def test_stage1_accumulation_keeps_the_objective(teacher: FrozenVFM, kind: str) -> None:
    loss = AlignLossConfig(contrastive_kind=kind, similarity=0.5)
    task = Stage1Task(encoder(), teacher, Histogram(), loss)
    whole = samples(8)
    once, expected = gradients(task, [collate(whole)], joined=True)
    split, found = gradients(task, [collate(whole[:4]), collate(whole[4:])], joined=False)
    # The similarity term is a mean over samples, the regression one over tokens: both split exactly.
    assert split == pytest.approx(once, abs=2e-5)
    assert set(found) == set(expected) and "log_scale" in found
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-6)
        assert ((found[name] - gradient).abs().max() / scale) < 2e-3, name


def test_stage1_terms_and_their_sum(teacher: FrozenVFM) -> None:
    batch = collate(samples(4))
    student = encoder()
    task = Stage1Task(
        student, teacher, Histogram(), AlignLossConfig(regression=2.0, contrastive=0.0, regression_kind="mse")
    )
    values = task(batch)
    tokens, _ = student(Histogram()(batch["events"]))
    target = layer_normalise(teacher.features(batch["image"])[0]).repeat_interleave(WINDOWS, dim=0)
    expected = (tokens - target).double().square().mean()
    assert values["loss"].item() == pytest.approx(2 * expected.item(), rel=1e-5) and set(values) == {
        "loss",
        "regression",
    }
    assert "log_scale" not in dict(task.named_parameters())


def test_activity_weights_follow_the_events(teacher: FrozenVFM) -> None:
    task = Stage1Task(encoder(), teacher, Histogram(), AlignLossConfig(activity=0.5))
    four = Events.from_arrays([1, 2, 3, 4], [13, 14, 15, 16], [7, 8, 9, 7], [1, 0, 1, 1], height=36, width=36)
    weight = task._activity(EventBatch.from_windows([four, Events.empty(36, 36)]))
    # All four lie in row 1, column 2 of the 6 × 6 patches.
    assert weight.shape == (2, 36)
    assert weight[0, 8].item() == pytest.approx(0.5 + 0.5 * 36) and weight[0, 0].item() == 0.5
    assert torch.isfinite(weight).all()


def test_nothing_frozen_is_a_parameter(teacher: FrozenVFM) -> None:
    stage1 = Stage1Task(encoder(), teacher, Histogram(), AlignLossConfig())
    assert {name.split(".")[0] for name, _ in stage1.named_parameters()} == {"encoder", "log_scale"}
    stage2 = Stage2Task(Backbone(96, 32, 1, 2), FrozenTokens(encoder(), teacher, Histogram()), NextLossConfig())
    assert {name.split(".")[0] for name in stage2.state_dict()} == {"backbone"}


def test_retrieval_by_hand() -> None:
    event = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.9, 0.5, 0]]), dim=1)
    image = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), dim=1)
    rows = {"event": event, "image": image, "token_cosine": torch.tensor([0.0, 0.5, 1.0]),
            "label": torch.tensor([1, 2, 3]), "zero_shot": torch.tensor([1, 2, 0])}  # fmt: skip
    found = evaluate_alignment(rows)
    # Event 3 prefers image 1; image 3 is orthogonal to all events: a tie, counted against us.
    assert found["event_to_image_r1"] == pytest.approx(200 / 3) and found["event_to_image_r5"] == 100
    assert found["image_to_event_r1"] == pytest.approx(200 / 3)
    assert found["token_cosine"] == 0.5 and found["zero_shot"] == pytest.approx(200 / 3)


def test_zero_shot_by_words_compares_with_the_text_vectors(teacher: FrozenVFM) -> None:
    vectors = F.normalize(torch.randn(4, 96, generator=torch.Generator().manual_seed(0)), dim=1)
    task = Stage1Task(encoder(), teacher, Histogram(), AlignLossConfig(), vectors)
    with torch.no_grad():
        rows = task.features(collate(samples(5)))
    assert torch.equal(rows["zero_shot"], (rows["event"] @ vectors.T).argmax(dim=1))
    assert not any("vectors" in name for name in task.state_dict())


def test_layouts() -> None:
    t_us, pair, image_t = np.array([[0, 10], [10, 20]]), np.array([0, 1]), np.array([9, 19])
    frames = {
        kind: lay_out(kind, t_us, pair, image_t) for kind in ("image_last", "image_first", "interleave", "events")
    }
    as_lists = {kind: [value.tolist() for value in frame.values()] for kind, frame in frames.items()}
    assert as_lists["image_last"] == [[EVENT, EVENT, IMAGE], [0, 1, 1], [10, 20, 19]]
    assert as_lists["image_first"] == [[IMAGE, EVENT, EVENT], [0, 0, 1], [0, 10, 20]]
    assert as_lists["interleave"] == [[EVENT, IMAGE, EVENT, IMAGE], [0, 0, 1, 1], [10, 10, 20, 20]]
    assert as_lists["events"] == [[EVENT, EVENT], [0, 1], [10, 20]]
    with pytest.raises(ValueError, match="image_last, image_first"):
        lay_out("shuffled", t_us, pair, image_t)


def test_tokens_stand_in_the_order_of_the_layout(teacher: FrozenVFM) -> None:
    student = encoder()
    batch = collate_sequences(sequences(4, ("image_first", "events")))
    sequence = FrozenTokens(student, teacher, Histogram())(batch)
    tokens, _ = student(Histogram()(batch["events"]))
    events = layer_normalise(tokens).unflatten(0, (4, 3))
    image = layer_normalise(teacher.features(batch["images"][:, 0])[0])
    assert torch.allclose(sequence.frames[0, 0], image[0]) and torch.allclose(sequence.frames[0, 3], events[0, 2])
    assert torch.allclose(sequence.frames[1, 0], events[1, 0])
    assert sequence.padded and sequence.valid.tolist()[:2] == [[True] * 4, [True] * 3 + [False]]
    assert torch.allclose(sequence.image, image[:, None].expand_as(sequence.image))
    # After an image nothing is left to predict of it.
    assert sequence.blind.tolist()[:2] == [[False] * 4, [True, True, True, False]]


@pytest.mark.parametrize("order", ["frame", "token"])
def test_stage2_accumulation_divides_by_the_global_count(teacher: FrozenVFM, order: str) -> None:
    torch.manual_seed(2)
    task = Stage2Task(
        Backbone(96, 32, 1, 2, order=order), FrozenTokens(encoder(), teacher, Histogram()), NextLossConfig()
    )
    # The first half has images and four frames, the second half has three frames and no image.
    whole = sequences(2, ("image_last",)) + sequences(2, ("events",))
    once, expected = gradients(task, [collate_sequences(whole)], joined=True)
    split, found = gradients(task, [collate_sequences(whole[:2]), collate_sequences(whole[2:])], joined=False)
    assert split == pytest.approx(once, rel=1e-5)
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-6)
        assert ((found[name] - gradient).abs().max() / scale) < 1e-3, name


def test_stage2_on_event_windows_alone(teacher: FrozenVFM) -> None:
    torch.manual_seed(2)
    task = Stage2Task(Backbone(96, 32, 1, 2), FrozenTokens(encoder(), teacher, Histogram()), NextLossConfig(image=0.0))
    with_images = sequences(3, ("events",))
    without = [
        {name: value for name, value in sample.items() if name not in ("images", "image")} for sample in with_images
    ]
    values, expected = (task(collate_sequences(part)) for part in (without, with_images))
    assert values["loss"].item() == expected["loss"].item() and set(values) == {"loss", "next"}
    found = evaluate_prediction(task.evaluate(collate_sequences(without)))
    assert found["loss"] > 0 and "predicted_image_r1" not in found and "image_loss" not in found


def test_stage2_loss_against_loops(teacher: FrozenVFM) -> None:
    torch.manual_seed(3)
    task = Stage2Task(
        Backbone(96, 32, 1, 2),
        FrozenTokens(encoder(), teacher, Histogram()),
        NextLossConfig(next=0.5, image=2.0, kind="mse"),
    )
    batch = collate_sequences(sequences(3, ("image_last", "events")))
    sequence = task.tokens(batch)
    output, _, _ = task.predict(sequence)
    errors = {"next": [], "image": []}
    for b in range(3):
        length = int(sequence.valid[b].sum())
        for f in range(length):
            for n in range(36):
                if f + 1 < length:
                    errors["next"].append(
                        (output.next[b, f, n] - sequence.frames[b, f + 1, n]).double().square().mean().item()
                    )
                if sequence.modality[b, f] == EVENT:
                    errors["image"].append(
                        (output.image[b, f, n] - sequence.image[b, f, n]).double().square().mean().item()
                    )
    expected = {name: float(np.mean(values)) for name, values in errors.items()}
    values = task(batch)
    assert values["next"].item() == pytest.approx(expected["next"], rel=1e-4)
    assert values["image"].item() == pytest.approx(expected["image"], rel=1e-4)
    assert values["loss"].item() == pytest.approx(0.5 * expected["next"] + 2 * expected["image"], rel=1e-4)


@pytest.mark.parametrize("order", ["frame", "token"])
def test_stage2_metrics_against_loops(teacher: FrozenVFM, order: str) -> None:
    torch.manual_seed(3)
    task = Stage2Task(
        Backbone(96, 32, 1, 2, order=order), FrozenTokens(encoder(), teacher, Histogram()), NextLossConfig()
    )
    batch = collate_sequences(sequences(3, ("image_last", "interleave")))
    found = evaluate_prediction(task.evaluate(batch))
    sequence = task.tokens(batch)
    output, _, _ = task.predict(sequence)
    error, copied, targets = [], [], {EVENT: [], IMAGE: []}
    for b in range(3):
        length = int(sequence.valid[b].sum())
        for f in range(length):
            for n in range(36):
                if order == "frame":
                    if f + 1 == length:
                        continue
                    after, before = sequence.frames[b, f + 1, n], sequence.frames[b, f, n]
                    kind = int(sequence.modality[b, f + 1])
                else:
                    g, m = (f, n + 1) if n < 35 else (f + 1, 0)
                    if g == length:
                        continue
                    after, kind = sequence.frames[b, g, m], int(sequence.modality[b, g])
                    before = sequence.frames[b, g - 1, m] if g else sequence.frames[b, f, n]
                error.append((output.next[b, f, n] - after).square().mean().item())
                copied.append((before - after).square().mean().item())
                targets[kind].append(after)
    spread, count = 0.0, 0
    for values in targets.values():
        stacked = torch.stack(values).double()
        spread += (stacked - stacked.mean(0)).square().mean(1).sum().item()
        count += len(values)
    assert found["loss"] == pytest.approx(np.mean(error), rel=1e-4)
    assert found["copy_previous"] == pytest.approx(np.mean(copied), rel=1e-4)
    assert found["mean_token"] == pytest.approx(spread / count, rel=1e-4)
    assert math.isfinite(found["predicted_image_r1"])


def test_tokens_of_another_teacher_are_refused(teacher: FrozenVFM) -> None:
    other = EventEncoder("vit_tiny_patch16_224", in_chans=2, img_size=(32, 32))
    with pytest.raises(ValueError, match="192 features and those of teacher.name have 96"):
        FrozenTokens(other, teacher, Histogram())
