"""DSEC's calibration file: where a pixel of the rectified event view lies in the picture, and depth from disparity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

Matrix = tuple[tuple[float, float, float], ...]


def load_calibration(path: Path) -> dict[str, Any]:
    """The file `cam_to_cam.yaml` as a dict.

    Raises:
        ValueError: no YAML mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable YAML ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no calibration (expected intrinsics, extrinsics and disparity_to_depth)")
    return found


def homography_to_picture(calibration: dict[str, Any], source: str) -> Matrix:
    """The map from a pixel of the left rectified event view (camRect0) to one of the left rectified picture (camRect1).

    The cameras are a few centimetres apart; for scenes at a distance only their rotation matters:
    K₁ · R_rect1 · R(T_10) · R_rect0⁻¹ · K₀⁻¹, T_10 taking points of camera 0 to camera 1.

    Args:
        calibration: see `load_calibration`.
        source: file name for messages.

    Returns:
        3 × 3, scaled so that the last entry is 1.

    Source: Gehrig et al. 2021, "DSEC", and its data-format page.
    """
    into = _rotation(calibration, source, "R_rect1") @ _rotation(calibration, source, "T_10")
    turn = into @ np.linalg.inv(_rotation(calibration, source, "R_rect0"))
    matrix = _camera(calibration, source, "camRect1") @ turn @ np.linalg.inv(_camera(calibration, source, "camRect0"))
    if not np.isfinite(matrix).all() or abs(matrix[2, 2]) < 1e-12:
        raise ValueError(f"{source}: the rotation between the cameras is none of two that look the same way")
    return tuple((float(a), float(b), float(c)) for a, b, c in matrix / matrix[2, 2])


def depth_factors(calibration: dict[str, Any], source: str) -> tuple[float, float, float]:
    """(f, 1/b, w0) of the event cameras' `disparity_to_depth/cams_03`: depth [m] = f / (disparity / b + w0)."""
    q = _matrix(calibration, source, ("disparity_to_depth", "cams_03"), (4, 4))
    focal, inverse_baseline, offset = float(q[2, 3]), float(q[3, 2]), float(q[3, 3])
    if not focal > 0 or not inverse_baseline > 0:
        raise ValueError(
            f"{source}: disparity_to_depth/cams_03 gives no positive depth (f={focal}, 1/b={inverse_baseline})"
        )
    return focal, inverse_baseline, offset


def _camera(calibration: dict[str, Any], source: str, name: str) -> np.ndarray:
    entry = _matrix(calibration, source, ("intrinsics", name, "camera_matrix"), (4,))
    fx, fy, cx, cy = entry
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def _rotation(calibration: dict[str, Any], source: str, name: str) -> np.ndarray:
    shape = (4, 4) if name.startswith("T_") else (3, 3)
    return _matrix(calibration, source, ("extrinsics", name), shape)[:3, :3]


def _matrix(calibration: dict[str, Any], source: str, where: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    found: Any = calibration
    for name in where:
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"{source}: holds no {'/'.join(where)}; get cam_to_cam.yaml of the sequence again")
        found = found[name]
    try:
        matrix = np.array(found, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != shape:
        raise ValueError(f"{source}: {'/'.join(where)} has the shape {matrix.shape}, expected {shape}")
    return matrix
