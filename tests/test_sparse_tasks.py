"""Who knows that patches were left out: the losses of both stages, probes, dense maps and exports."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from downstream.common import pool_tokens, window_features
from downstream.dense.features import DenseFeatures, pad_to_multiple
from downstream.recognition.task import FinetuneTask
from gep.data.config import DataConfig
from gep.data.paired import collate
from gep.data.sequence import collate_sequences
from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.losses import similarity_structure
from gep.models import Backbone, EventEncoder, FrozenVFM, ImageModel
from gep.models.sparse import mean_token, patch_activity
from stage1_align.task import AlignLossConfig, Stage1Task, layer_normalise
from stage2_autoregress.task import NextLossConfig, Stage2Task
from stage2_autoregress.tokens import FrozenTokens
from tests.test_stages import gradients, samples, sequences

SIZE = (36, 36)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> FrozenVFM:
    torch.manual_seed(0)
    model = ImageModel({"arch": "nano", "in_chans": 3, "img_size": SIZE}, list("0123456789"))
    return FrozenVFM.from_spec(f"export:{model.save(tmp_path_factory.mktemp('teacher') / 'export')}")


def encoder(keep: float | str = 0.5, **changes) -> EventEncoder:
    torch.manual_seed(1)
    return EventEncoder("nano", 2, SIZE, head_dim=96, keep=keep, **changes)


# Stage 1.


@pytest.mark.parametrize("keep", [0.5, "active"])
def test_stage1_terms_know_which_tokens_are_real(teacher: FrozenVFM, keep: float | str) -> None:
    student = encoder(keep)
    loss = AlignLossConfig(regression=2.0, regression_kind="mse", similarity=0.5, contrastive=0.25)
    task = Stage1Task(student, teacher, Histogram(), loss)
    batch = collate(samples(3))
    frames = Histogram()(batch["events"])
    values = task(batch)
    tokens, _ = student(frames)
    real = student.real(frames)
    target = layer_normalise(teacher.features(batch["image"])[0]).repeat_interleave(2, dim=0)
    error = (tokens - target).double().square().mean(-1)
    own = sum(error[i][real[i]].mean().item() for i in range(6)) / 6
    empty = sum(error[i][~real[i]].mean().item() for i in range(6)) / 6
    structure = sum(
        similarity_structure(tokens[i : i + 1, real[i]], target[i : i + 1, real[i]]).item() for i in range(6)
    )
    assert values["regression"].item() == pytest.approx(own, rel=1e-5)
    assert values["empty"].item() == pytest.approx(empty, rel=1e-5)
    assert values["similarity"].item() == pytest.approx(structure / 6, rel=1e-4)
    total = 2 * (own + empty) + 0.5 * structure / 6 + 0.25 * values["contrastive"].item()
    assert values["loss"].item() == pytest.approx(total, rel=1e-5)
    pooled = torch.stack([tokens[i][real[i]].mean(0) for i in range(6)]).unflatten(0, (3, 2)).mean(1)
    assert_close(task._pool(tokens, 2, real), F.normalize(student.head(pooled), dim=-1))
    assert_close(task.features(batch)["event"], F.normalize(student.head(pooled), dim=-1))
    values["loss"].backward()
    assert all(value.grad is not None for value in task.parameters() if value.requires_grad)
    # The learned token is trained by the places that were left out, which move nothing below the final norm.
    only = task._regressions(student(frames)[0], target, real, None)["empty"]
    moved = torch.autograd.grad(only, list(student.parameters()), allow_unused=True, materialize_grads=True)
    assert [name for (name, _), g in zip(student.named_parameters(), moved) if g.abs().max() > 0] == ["empty"]


@pytest.mark.parametrize("keep", [0.5, "active"])
def test_stage1_accumulation_keeps_the_objective(teacher: FrozenVFM, keep: float | str) -> None:
    task = Stage1Task(encoder(keep), teacher, Histogram(), AlignLossConfig(similarity=0.5, activity=0.5))
    whole = samples(6)
    for index, sample in enumerate(whole):  # windows with more and fewer active patches
        sample["events"] = [part[: 8 + 9 * index] for part in sample["events"]]
    once, expected = gradients(task, [collate(whole)], joined=True)
    split, found = gradients(task, [collate(whole[:3]), collate(whole[3:])], joined=False)
    assert split == pytest.approx(once, abs=2e-5) and set(found) == set(expected)
    for name, gradient in expected.items():
        assert ((found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-6)) < 2e-3, name


def test_parameters_that_nothing_reads_ask_for_no_gradient(teacher: FrozenVFM) -> None:
    batch = collate(samples(2))
    for weights in (
        {"regression": 0.0},
        {"contrastive": 0.0},
        {"regression": 0.0, "contrastive": 0.0, "similarity": 1.0},
    ):
        task = Stage1Task(encoder(), teacher, Histogram(), AlignLossConfig(**weights))
        task(batch)["loss"].backward()
        assert all(value.grad is not None for value in task.parameters() if value.requires_grad), weights
    for use_backbone in (False, True):
        task = FinetuneTask(model(0.5), 10, feature="all", use_backbone=use_backbone)
        torch.nn.init.normal_(task.head.weight)
        task(batch)["loss"].backward()
        idle = [name for name, value in task.named_parameters() if value.requires_grad and value.grad is None]
        assert not idle


# Stage 2.


@pytest.mark.parametrize("order", ["frame", "token"])
@pytest.mark.parametrize("keep", [0.5, "active"])
def test_stage2_predicts_real_tokens_only(teacher: FrozenVFM, order: str, keep: float | str) -> None:
    torch.manual_seed(3)
    loss = NextLossConfig(kind="mse", contrastive=0.0)
    task = Stage2Task(Backbone(96, 32, 1, 2, order=order), FrozenTokens(encoder(keep), teacher, Histogram()), loss)
    batch = collate_sequences(sequences(3, ("image_last", "interleave")))
    sequence = task.tokens(batch)
    real = task.tokens.encoder.real(Histogram()(batch["events"])).unflatten(0, (3, 3))
    output, _, mask = task.predict(sequence)
    errors = []
    for b in range(3):
        length = int(sequence.valid[b].sum())
        for f in range(length):
            assert sequence.real[b, f].all() == (sequence.modality[b, f] == 1)
            if sequence.modality[b, f] == 0:
                assert torch.equal(sequence.real[b, f], real[b, batch["source"][b, f]])
            for n in range(36):
                after = (f + 1, n) if order == "frame" else (f, n + 1) if n < 35 else (f + 1, 0)
                counts = after[0] < length and bool(sequence.real[b, after[0], after[1]])
                assert bool(mask[b, f, n]) == counts
                if counts:
                    errors.append((output.next[b, f, n] - sequence.frames[b][after]).double().square().mean().item())
    values = task(batch)
    assert values["next"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    halves = [collate_sequences(part) for part in (sequences(3)[:1], sequences(3)[1:])]
    counted = task.context(halves)
    parts = [task.predict(task.tokens(half))[2].sum().item() / 36 for half in halves]
    assert counted[0].item() == pytest.approx(sum(parts) / 2)


def test_stage2_contrasts_with_the_real_tokens_of_the_true_frame(teacher: FrozenVFM) -> None:
    torch.manual_seed(3)
    task = Stage2Task(
        Backbone(96, 32, 1, 2),
        FrozenTokens(encoder(0.5), teacher, Histogram()),
        NextLossConfig(contrastive=1.0, image=0.0),
    )
    batch = collate_sequences(sequences(3))
    sequence = task.tokens(batch)
    output, target, mask = task.predict(sequence)
    before = task._contrast(output.next, target, mask)
    spoiled = target.masked_fill(~mask[..., None], 7.0)
    assert torch.equal(task._contrast(output.next, spoiled, mask), before)


# Downstream.


def model(keep: float | str) -> GEPModel:
    settings = DataConfig(height=36, width=36, windows=2, window_us=100)
    torch.manual_seed(5)
    return GEPModel.from_parts(encoder(keep), Histogram(), settings, backbone=Backbone(96, 32, 2, 2)).eval()


def test_probes_pool_the_real_tokens() -> None:
    batch, sparse = collate(samples(3)), model("active")
    frames = Histogram()(batch["events"])
    with torch.no_grad():
        tokens, real = sparse.encoder(frames)[0], sparse.encoder.real(frames)
        for pool in ("mean", "mean_std", "mean_max"):
            found = window_features(sparse, batch, use_backbone=False, pool=pool).window.flatten(0, 1)
            for row in range(6):
                own = tokens[row][real[row]]
                want = {"mean": own[:0, 0], "mean_std": own.std(0), "mean_max": own.amax(0)}[pool]
                assert_close(found[row], torch.cat([own.mean(0), want]), atol=1e-5, rtol=1e-4)
        whole = window_features(sparse, batch)
        out = sparse(frames.unflatten(0, (3, 2)), batch["t_us"][..., 1])
        assert_close(whole.image, out.image.mean(2))  # the backbone says something of every place
        assert_close(whole.encoder, mean_token(tokens, real).unflatten(0, (3, 2)))
        assert_close(whole.encoder, out.pooled)
    one = torch.zeros(1, 4, dtype=torch.bool)
    one[0, 2] = True
    values = torch.randn(1, 4, 3, requires_grad=True)
    pooled = pool_tokens(values, "mean_std", one)
    assert_close(pooled[0, :3], values[0, 2])
    assert pooled[0, 3:].abs().max() < 1e-5
    pooled.sum().backward()
    assert torch.isfinite(values.grad).all()


def test_dense_maps_are_whole() -> None:
    sparse = model(0.5)
    features = DenseFeatures(sparse, use_backbone=False, num_levels=2)
    frames = torch.zeros(1, 1, 2, 34, 40)
    frames[0, 0, 0, :12, :12] = 1.0
    maps = features(frames)
    real = sparse.encoder.real(pad_to_multiple(frames[:, 0], (6, 6))[0])[0]
    assert real.sum() == 21 and real.unflatten(0, (6, 7))[:2, :2].all()
    for level in maps.levels:
        assert level.shape == (1, 96, 6, 7) and torch.isfinite(level).all()
        flat = level.flatten(2)[0].T
        assert_close(flat[~real], sparse.encoder.vit.norm(sparse.encoder.empty).expand(21, -1))
        assert flat[real].std(0).mean() > 0
    # White without events: the rows that pad the window hold none either.
    torch.manual_seed(0)
    white = EventEncoder("nano", 3, SIZE, keep=0.5, background=1.0)
    padded, _ = pad_to_multiple(torch.ones(1, 3, 34, 34), (6, 6), white.background)
    assert patch_activity(padded, (6, 6), 1.0).eq(0).all()


def test_exports_carry_it_and_older_ones_load(tmp_path) -> None:
    sparse = model("active")
    folder = sparse.save_pretrained(tmp_path / "sparse")
    again = GEPModel.from_pretrained(folder)
    frames = (torch.rand(2, 2, 2, *SIZE) > 0.9).float()
    with torch.no_grad():
        assert again.encoder.keep == "active" and torch.equal(again(frames).tokens, sparse(frames).tokens)
    older = {key: value for key, value in encoder(1.0).config.items() if key not in ("keep", "background")}
    old = EventEncoder(**older)
    assert old.keep == 1.0 and list(old.state_dict()) == list(encoder(1.0).state_dict())
