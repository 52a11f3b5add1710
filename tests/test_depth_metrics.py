"""Depth's scale and numbers against hand-computed cases and float64 loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from downstream.depth.metrics import depth_rows, depth_summary, tables
from downstream.depth.scale import SCALES, DepthScale

NAN = float("nan")
NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "delta1", "delta2", "delta3", "mae")


def frames(num: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse truth of 0.5–120 m, predictions a factor beside it, and event pixels; the last frame holds no truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = 0.5 * torch.exp(torch.rand(num, 9, 12, generator=generator) * math.log(240))
    prediction = truth * torch.exp(0.4 * torch.randn(truth.shape, generator=generator) + 0.1)
    truth[torch.rand(truth.shape, generator=generator) < 0.4] = NAN
    truth[-1] = NAN
    return prediction, truth, torch.rand(truth.shape, generator=generator) < 0.3


def reference(predictions: list[float], truths: list[float]) -> dict[str, float]:
    """One list of pixels by the textbook, pixel by pixel in Python's float64."""
    n = len(truths)
    pairs = list(zip(predictions, truths))
    logs = [math.log(d) - math.log(g) for d, g in pairs]
    values = {
        "abs_rel": sum(abs(d - g) / g for d, g in pairs) / n,
        "sq_rel": sum((d - g) ** 2 / g for d, g in pairs) / n,
        "sq_rel_gt2": sum((d - g) ** 2 / g**2 for d, g in pairs) / n,
        "rmse": math.sqrt(sum((d - g) ** 2 for d, g in pairs) / n),
        "rmse_log": math.sqrt(sum(e**2 for e in logs) / n),
        "silog": sum(e**2 for e in logs) / n - (sum(logs) / n) ** 2,
        "mae": sum(abs(d - g) for d, g in pairs) / n,
    }
    for k in (1, 2, 3):
        values[f"delta{k}"] = sum(max(d / g, g / d) < 1.25**k for d, g in pairs) / n
    for limit in (10, 20, 30):
        near = [abs(d - g) for d, g in pairs if g < limit]
        values[f"mae_{limit}"] = sum(near) / len(near) if near else NAN
    return values


def pixels_of(
    prediction: torch.Tensor, truth: torch.Tensor, events: torch.Tensor, cutoff: float, kind: str
) -> tuple[list[float], list[float]]:
    """A frame's pixels that count, predictions clamped."""
    chosen = [
        (min(float(d), cutoff), float(g))
        for d, g, e in zip(prediction.flatten().tolist(), truth.flatten().tolist(), events.flatten().tolist())
        if not math.isnan(g) and g <= cutoff and (e or kind == "all")
    ]
    return [d for d, _ in chosen], [g for _, g in chosen]


@pytest.mark.parametrize("cutoff", [30.0, 80.0])
@pytest.mark.parametrize("kind", ["all", "events"])
def test_rows_are_the_reference_frame_by_frame(cutoff: float, kind: str) -> None:
    data = frames()
    rows = depth_rows(*data)
    for index, one in enumerate(zip(*data)):
        predictions, truths = pixels_of(*one, cutoff, kind)
        prefix = f"cut-off {cutoff:g} m/{kind}"
        assert rows[f"{prefix}/pixels"][index] == len(truths)
        expected = reference(predictions, truths) if truths else dict.fromkeys(NAMES, NAN)
        for name, value in expected.items():
            assert rows[f"{prefix}/{name}"].dtype == torch.float64
            assert rows[f"{prefix}/{name}"][index].item() == pytest.approx(value, rel=1e-9, nan_ok=True), name
    assert not any(row[-1].isfinite() for name, row in rows.items() if "pixels" not in name)


def test_a_hand_computed_frame() -> None:
    truth = torch.tensor([[[10.0, 20.0, 40.0, NAN], [100.0, 0.0, -1.0, NAN]]])
    prediction = torch.tensor([[[12.0, 15.0, 90.0, 3.0], [5.0, 5.0, 5.0, 5.0]]])
    events = torch.zeros(1, 2, 4, dtype=torch.bool)
    events[0, 0, 1] = True
    summary = depth_summary(depth_rows(prediction, truth, events), ["drive"])
    far, near = summary["cut-off 80 m"]["all"], summary["cut-off 30 m"]["all"]
    assert far["pixels"] == 3 and near["pixels"] == 2  # 100 m, 0 and below are no truth; 40 m lies beyond 30 m
    assert far["abs_rel"] == pytest.approx((0.2 + 0.25 + 1.0) / 3)  # 90 m is clamped to 80 m
    assert near["abs_rel"] == pytest.approx((0.2 + 0.25) / 2)
    assert far["sq_rel"] == pytest.approx((4 / 10 + 25 / 20 + 1600 / 40) / 3)
    assert far["rmse"] == pytest.approx(math.sqrt((4 + 25 + 1600) / 3))
    logs = [math.log(1.2), math.log(0.75), math.log(2)]
    assert far["rmse_log"] == pytest.approx(math.sqrt(sum(e * e for e in logs) / 3))
    assert far["silog"] == pytest.approx(np.var(logs))
    assert (far["delta1"], far["delta2"], far["delta3"]) == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert far["mae"] == pytest.approx((2 + 5 + 40) / 3)
    assert math.isnan(far["mae_10"]) and far["mae_20"] == pytest.approx(2) and far["mae_30"] == pytest.approx(3.5)
    on_events = summary["cut-off 80 m"]["events"]
    assert on_events["pixels"] == 1 and on_events["abs_rel"] == pytest.approx(0.25)


def test_a_ratio_of_exactly_the_threshold_is_outside() -> None:
    truth, prediction = torch.tensor([[[4.0, 5.0, 4.0]]]), torch.tensor([[[5.0, 4.0, 4.9]]])
    rows = depth_rows(prediction, truth, truth > 0)
    assert rows["cut-off 80 m/all/delta1"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("sq_rel", ["gt", "gt2"])
@pytest.mark.parametrize("kind", ["all", "events"])
def test_summary_averages_frames_or_pixels(sq_rel: str, kind: str) -> None:
    """The two ways differ, and so do SqRel's two divisors: each is its own reference."""
    data = frames(num=6, seed=1)
    rows = depth_rows(*data)
    groups = ["a", "b", "a", "b", "b", "c"]
    for averaging in ("frame", "pixel"):
        table = depth_summary(rows, groups, sq_rel=sq_rel, averaging=averaging)["cut-off 30 m"]
        assert list(table["sequences"]) == ["a", "b", "c"]
        assert table["averaging"] == averaging and table["sq_rel"] == sq_rel
        cases = {"": (range(6), table), **{g: (None, table["sequences"][g]) for g in "ab"}}
        for group, (members, entry) in cases.items():
            members = members or [index for index, name in enumerate(groups) if name == group]
            lists = [pixels_of(*(part[index] for part in data), 30.0, kind) for index in members]
            lists = [one for one in lists if one[1]]
            if averaging == "pixel":
                expected = reference([d for one in lists for d in one[0]], [g for one in lists for g in one[1]])
            else:
                each = [reference(*one) for one in lists]
                expected = {name: np.nanmean([one[name] for one in each]) for name in each[0]}
            expected["sq_rel"] = expected.pop("sq_rel_gt2") if sq_rel == "gt2" else expected["sq_rel"]
            expected.pop("sq_rel_gt2", None)
            for name, value in expected.items():
                assert entry[kind][name] == pytest.approx(value, rel=1e-9), (group, name)
            assert entry[kind]["frames"] == len(lists) and entry[kind]["pixels"] == sum(len(g) for _, g in lists)
    assert math.isnan(table["sequences"]["c"]["all"]["abs_rel"]) and table["sequences"]["c"]["all"]["frames"] == 0


def test_averaging_and_divisor_matter() -> None:
    """RAMNet's two habits change the numbers; were the options ignored, these would be equal."""
    rows, groups = depth_rows(*frames()), ["a"] * 5
    by_frame = depth_summary(rows, groups)["cut-off 80 m"]["all"]
    by_pixel = depth_summary(rows, groups, averaging="pixel")["cut-off 80 m"]["all"]
    squared = depth_summary(rows, groups, sq_rel="gt2")["cut-off 80 m"]["all"]
    assert by_frame["rmse"] != pytest.approx(by_pixel["rmse"], rel=1e-3)
    assert by_frame["sq_rel"] > 2 * squared["sq_rel"]
    assert by_frame["abs_rel"] == squared["abs_rel"]


def test_two_ranks_give_the_numbers_of_one_to_the_last_bit() -> None:
    data = frames(num=7)
    whole = depth_rows(*data)
    parts = [depth_rows(*(part[rank::2] for part in data)) for rank in range(2)]
    joined = {name: torch.empty_like(row) for name, row in whole.items()}
    for name, row in joined.items():
        row[0::2], row[1::2] = parts[0][name], parts[1][name]
        assert torch.equal(row.nan_to_num(-1), whole[name].nan_to_num(-1)), name
    groups = [f"s{index // 3}" for index in range(7)]
    assert str(depth_summary(joined, groups)) == str(depth_summary(whole, groups))


def test_an_empty_set_is_nan_not_a_number_of_nothing() -> None:
    nothing = torch.full((2, 3, 3), NAN)
    entry = depth_summary(depth_rows(torch.ones(2, 3, 3), nothing, nothing > 0), ["a", "a"])["cut-off 80 m"]["all"]
    assert all(math.isnan(entry[name]) for name in (*NAMES, "mae_10")) and entry["frames"] == entry["pixels"] == 0


def test_a_prediction_that_is_not_finite_is_an_error_only_where_there_is_truth() -> None:
    prediction, truth, events = frames()
    prediction[truth.isnan()] = NAN
    assert depth_rows(prediction, truth, events)["cut-off 80 m/all/abs_rel"][0].isfinite()
    prediction[:] = NAN
    # A rank that raised alone would leave the others waiting for its rows; gathered, all raise alike.
    prediction[0], (good, *_) = torch.where(truth[0].isnan(), NAN, 1.0), frames()
    prediction[1:] = NAN
    rows = depth_rows(prediction, truth, events)
    known = (truth > 0).flatten(1).any(dim=1)
    assert rows["pixels_not_finite"].gt(0).tolist() == [False, *known[1:].tolist()] and known[:2].all()
    groups = [f"s{index}" for index in range(len(truth))]
    message = rf"predicted depth is not finite in {int(known[1:].sum())} of {len(truth)} .*number 1 \(of s1\)"
    with pytest.raises(ValueError, match=message):
        depth_summary(rows, groups)
    depth_summary(depth_rows(good, truth, events), groups)
    with pytest.raises(ValueError, match="same \\(B, H, W\\)"):
        depth_rows(truth[:, :4], truth, events)


def test_half_precision_and_other_cutoffs() -> None:
    """float32 of 1000 m squared and summed would lose digits; a custom cut-off names its own table."""
    truth = torch.full((1, 200, 200), 900.0)
    rows = depth_rows(truth.half() + 1, truth, truth > 0, cutoffs=(1000.0,))
    assert rows["cut-off 1000 m/all/rmse"].item() == pytest.approx(1.0, rel=1e-12)
    assert list(depth_summary(rows, ["x"])) == ["cut-off 1000 m"]


def test_tables_name_the_cutoff_in_every_header() -> None:
    summary = depth_summary(depth_rows(*frames()), ["day1", "night1", "day1", "night1", "night1"], sq_rel="gt2")
    text = tables(summary)
    blocks = text.split("\n\n")
    assert [block.split(" · ")[0] for block in blocks] == ["cut-off 30 m", "cut-off 80 m"]
    for block, table in zip(blocks, summary.values()):
        head, columns, *body = block.splitlines()
        assert "mean per frame" in head and "SqRel ÷ gt²" in head
        assert columns.split()[:2] == ["AbsRel", "SqRel"]
        assert [line.rsplit(",", 1)[0] for line in body[::2]] == ["all frames", "day1", "night1"]
        assert f"{table['all']['abs_rel']:.3f}" == body[0].split()[3]
        assert len({len(line) for line in (columns, *body)}) == 1


def test_scale_is_the_published_formula() -> None:
    for name, far, alpha in (("mvsec", 80.0, 3.70378), ("eventscape", 1000.0, 5.70378)):
        scale = SCALES[name]
        depth = np.array([0.1, 2.0, 3.7, 10.0, 79.9, 80.0, 500.0, 5000.0])
        expected = np.clip(1 + np.log(np.clip(depth, 0, far) / far) / alpha, 0, 1)
        np.testing.assert_allclose(scale.to_target(torch.from_numpy(depth)).numpy(), expected, rtol=1e-12, atol=1e-15)
        y = torch.linspace(0, 1, 11, dtype=torch.float64)
        np.testing.assert_allclose(scale.to_metres(y).numpy(), far * np.exp(-alpha * (1 - y.numpy())), rtol=1e-12)
    assert SCALES["mvsec"].min_m == pytest.approx(1.9703, abs=2e-3)


def test_scale_there_and_back() -> None:
    scale = SCALES["mvsec"]
    depth = torch.linspace(scale.min_m, scale.max_m, 997, dtype=torch.float64)
    torch.testing.assert_close(scale.to_metres(scale.to_target(depth)), depth, rtol=1e-12, atol=0)
    torch.testing.assert_close(scale.to_metres(scale.to_target(depth.float())), depth.float(), rtol=3e-6, atol=0)
    assert scale.to_metres(torch.tensor([-3.0, 4.0])).tolist() == pytest.approx([scale.min_m, 80.0])
    assert scale.to_target(torch.tensor([1.0, 200.0, math.inf])).tolist() == [0.0, 1.0, 1.0]
    assert scale.to_target(torch.tensor([NAN, 0.0, -2.0, -math.inf])).isnan().all()
    assert scale.to_metres(torch.tensor([NAN])).isnan().all()
    assert scale.to_target(torch.tensor([5.0], dtype=torch.float16)).dtype == torch.float32


def test_scale_between_two_depths() -> None:
    scale = DepthScale.between(0.5, 20.0)
    assert scale.min_m == pytest.approx(0.5) and scale.max_m == 20.0
    assert scale.to_target(torch.tensor([0.5, 20.0, math.sqrt(10.0)])).tolist() == pytest.approx([0, 1, 0.5])
    for near, far in ((0.0, 5.0), (5.0, 5.0), (5.0, math.inf)):
        with pytest.raises(ValueError, match="is no range"):
            DepthScale.between(near, far)
    with pytest.raises(ValueError, match="depth alpha=0"):
        DepthScale(80.0, 0)
