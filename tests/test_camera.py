"""Camera paths: the measured table, bounds and smoothness of random motion, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from gep.events.camera import CameraPath, nmnist_saccades, smooth_random

SIZES = {"image_size": (28, 28), "sensor_size": (34, 34)}


def where(path: CameraPath, x: float, y: float) -> torch.Tensor:
    """(B, S, 2) source position of an output pixel."""
    moved = path.homography.double() @ torch.tensor([x, y, 1.0], dtype=torch.float64)
    return moved[..., :2] / moved[..., 2:]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_saccades_follow_the_table():
    path = nmnist_saccades(2, **SIZES, offset_px=0.0)
    assert path.t_us.tolist() == list(range(0, 310001, 5000)) and len(path) == 2
    # The row of 45 ms: the image's centre is at (-2.657, 0.948) from the sensor's centre.
    at = where(path, 16.5 - 2.657, 16.5 + 0.948)[:, 9]
    torch.testing.assert_close(at, torch.full((2, 2), 13.5, dtype=torch.float64), atol=1e-5, rtol=0)


def test_saccades_between_the_table_and_offsets():
    path = nmnist_saccades(1, **SIZES, step_us=2500, offset_px=0.0)
    middle = where(path, 0, 0)[0, 19]  # 47.5 ms, between (-2.657, 0.948) and (-2.586, 1.622)
    expected = torch.tensor([-3 + 2.6215, -3 - 1.285], dtype=torch.float64)
    torch.testing.assert_close(middle, expected, atol=1e-5, rtol=0)
    shifted = nmnist_saccades(2000, **SIZES, offset_px=0.3, generator=seeded(0))
    offset = where(shifted, 0, 0) - where(nmnist_saccades(1, **SIZES, offset_px=0.0), 0, 0)
    assert offset.std(1).max() < 1e-5  # constant in time
    torch.testing.assert_close(offset[:, 0].std(0), torch.tensor([0.3, 0.3]).double(), atol=0.02, rtol=0)


def test_smooth_random_at_rest_fits_the_image():
    still = {"duration_us": 1000, "steps": 4, "max_shift_px": 0.0, "generator": seeded(0)}
    size = {"image_size": (60, 40), "sensor_size": (30, 40)}
    corner = torch.tensor([-0.5, -0.5])
    for fit, source in (("none", (-0.5, 14.5)), ("contain", (-20.5, -0.5)), ("cover", (-0.5, 14.5))):
        at = where(smooth_random(1, **size, **still, fit=fit), *corner.tolist())[0, 0]
        torch.testing.assert_close(at, torch.tensor(source).double(), atol=1e-4, rtol=0)


def test_smooth_random_moves_always_and_within_bounds():
    common = {"duration_us": 100_000, "steps": 200, **SIZES}
    path = smooth_random(50, max_shift_px=4.0, generator=seeded(1), **common)
    shift = where(path, 16.5, 16.5) - 13.5
    assert shift.norm(dim=-1).max() <= 4.0 + 1e-3
    speed = (shift[:, 1:] - shift[:, :-1]).norm(dim=-1) * 200
    assert speed.min() > 4.0
    # Smooth: the speed's direction and size change little in one of 200 steps.
    step = shift[:, 1:] - shift[:, :-1]
    assert (step[:, 1:] - step[:, :-1]).norm(dim=-1).max() < 0.1 * step.norm(dim=-1).max()

    turning = smooth_random(50, max_shift_px=0.0, max_rotation_rad=0.3, generator=seeded(2), **common)
    angle = torch.atan2(turning.homography[..., 1, 0], turning.homography[..., 0, 0])
    assert 0.15 < angle.abs().max() <= 0.3 + 1e-5
    zooming = smooth_random(50, max_shift_px=0.0, max_scale=0.2, generator=seeded(3), **common)
    scale = torch.linalg.det(zooming.homography[..., :2, :2]).sqrt().log()
    assert 0.1 < scale.abs().max() <= 0.2 + 1e-5
    tilted = smooth_random(50, max_shift_px=0.0, max_perspective=0.2, generator=seeded(4), **common)
    corner = tilted.homography @ torch.tensor([33.0, 33.0, 1.0])
    assert corner[..., 2].min() > 0.5 and corner[..., 2].max() < 1.5


def test_smooth_random_is_reproducible():
    args = {"duration_us": 1000, "steps": 3, "max_shift_px": 2.0, "max_shear": 0.1, **SIZES}
    first, again, other = (smooth_random(2, **args, generator=seeded(s)).homography for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_shifts_and_slices():
    shift = torch.tensor([[[0.0, 0.0], [1.0, -2.0]]])
    path = CameraPath.from_shifts(torch.tensor([0, 10]), shift, image_size=(4, 4), sensor_size=(4, 4))
    assert where(path, 2, 1)[0].tolist() == [[2, 1], [1, 3]]
    assert len(path[:0]) == 0 and len(path[:1]) == 1


@pytest.mark.parametrize(
    ("t_us", "homography", "message"),
    [
        (torch.tensor([0, 5, 5]), torch.eye(3).repeat(1, 3, 1, 1), "ascend strictly"),
        (torch.tensor([0.0, 5.0]), torch.eye(3).repeat(1, 2, 1, 1), "int64"),
        (torch.tensor([0, 5]), torch.eye(3).repeat(1, 3, 1, 1), r"\(B, 2, 3, 3\)"),
        (torch.tensor([0, 5]), torch.full((1, 2, 3, 3), math.nan), "NaN"),
    ],
)
def test_bad_paths_are_refused(t_us, homography, message):
    with pytest.raises(ValueError, match=message):
        CameraPath(t_us, homography)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="step_us"):
        nmnist_saccades(1, **SIZES, step_us=0)
    with pytest.raises(ValueError, match="max_perspective"):
        smooth_random(1, **SIZES, duration_us=10, steps=2, max_shift_px=1, max_perspective=0.9)
    with pytest.raises(ValueError, match="none, contain, cover"):
        smooth_random(1, **SIZES, duration_us=10, steps=2, max_shift_px=1, fit="fill")
