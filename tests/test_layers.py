"""Planes in space against rays cast one pixel at a time; parallax, occlusion and light by hand; events of all that.

One file: the caster of rays is what all of it is compared with.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gep.events import stepping
from gep.events.camera import CameraPath
from gep.events.layers import Layer, Layers
from gep.events.sensor import NMNIST_SENSOR, SensorModel
from gep.events.simulate import simulate_events, simulate_view

HEIGHT, WIDTH, FOCAL = 9, 11, 13.0
CAMERA = np.array([[FOCAL, 0, (WIDTH - 1) / 2], [0, FOCAL, (HEIGHT - 1) / 2], [0, 0, 1]])
QUIET = SensorModel(threshold=0.05, threshold_mismatch=0.0)
SHARP = SensorModel(
    response="power", gamma=1.6, invert=True, threshold=0.08, threshold_mismatch=0.1, refractory_us=300,
    shot_noise_hz=5.0,
)  # fmt: skip


def turn(vector) -> np.ndarray:
    """The rotation by a vector's length [rad] about it (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    x, y, z = np.asarray(vector) / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def cast(corner, a, b, rotation, position, camera=CAMERA, size=(HEIGHT, WIDTH)):
    """(u, v, Z) of every pixel, each (height, width) float64; Z is NaN where the ray does not meet the plane.

    Rays in world coordinates: the camera at `position`, `rotation` taking the world's axes to its own; the plane has
    the texel (0, 0) at `corner` and its columns and rows along a and b.
    """
    u, v, depth = (np.full(size, np.nan) for _ in range(3))
    normal = np.cross(a, b)
    for y in range(size[0]):
        for x in range(size[1]):
            seen = [(x - camera[0, 2]) / camera[0, 0], (y - camera[1, 2]) / camera[1, 1], 1.0]
            ray = rotation.T @ seen
            slope = normal @ ray
            reach = normal @ (corner - position) / slope if slope else -1.0
            if reach > 0:
                point = position + reach * ray
                u[y, x], v[y, x] = (point - corner) @ a / (a @ a), (point - corner) @ b / (b @ b)
                depth[y, x] = (rotation @ (point - position))[2]
    return u, v, depth


def homography(corner, a, b, rotation, position) -> torch.Tensor:
    """(1, S, 3, 3) of one plane before a camera of S poses, from what three texels and the pixels project to."""
    found = []
    for turned, place in zip(rotation, position, strict=True):
        texels = np.array([[0.0, 0, 1], [1, 0, 1], [0, 1, 1]])
        points = np.array([turned @ (corner + u * a + v * b - place) for u, v, _ in texels])
        pixels = points @ CAMERA.T  # Z (x, y, 1)
        found.append(np.linalg.solve(pixels, texels).T)
    return torch.from_numpy(np.stack(found))[None]


def ramps(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Textures (1, rows, columns) whose brightness at (u, v) is (u + 1) / 64 and (v + 1) / 64."""
    v, u = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (u[None] + 1).double() / 64, (v[None] + 1).double() / 64


def scene(*layers: Layer, size=(HEIGHT, WIDTH)) -> Layers:
    return Layers(layers, torch.arange(layers[0].homography.shape[1]) * 1000, *size)


def flat(depth: float, steps: int = 1, dtype=torch.float64) -> torch.Tensor:
    """A plane whose texel (x, y) lies behind the pixel (x, y)."""
    return (torch.eye(3, dtype=dtype) / depth).expand(1, steps, 3, 3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_finite(layers: Layers) -> None:
    for step in range(len(layers.t_us)):
        truth = layers.truth(step)
        assert torch.isfinite(layers.watch()(step)).all() and torch.isfinite(truth.depth).all()
        assert (truth.depth > 0).all()


@pytest.mark.parametrize("opaque", [True, False])
def test_every_pixel_by_ray_casting(opaque):
    rng = np.random.default_rng(0)
    for _ in range(4):
        turned = np.stack([turn(vector) for vector in rng.uniform(-0.2, 0.2, (3, 3))])
        place = rng.uniform(-0.3, 0.3, (3, 3))
        axes = turn(rng.uniform(-0.6, 0.6, 3))
        a, b = axes[:, 0] * 0.12, axes[:, 1] * 0.1
        corner = np.array([*rng.uniform(-0.2, 0.2, 2), 3.0]) - 19.5 * a - 17.5 * b
        matrix = homography(corner, a, b, turned, place)
        seen = []
        for ramp in ramps(36, 40):
            layer = Layer(ramp, None if opaque else torch.ones_like(ramp), matrix)
            behind = [] if opaque else [Layer(torch.zeros_like(ramp), None, flat(1e3, 3))]
            seen.append(scene(*behind, layer))
        for step in range(3):
            u, v, depth = cast(corner, a, b, turned[step], place[step])
            inside = (u >= 0) & (u <= 39) & (v >= 0) & (v <= 35)
            assert inside.sum() > 60 and np.nanstd(depth) > 0.05
            truth = seen[0].truth(step)
            assert (truth.layer[0].numpy()[inside] == int(not opaque)).all()
            np.testing.assert_allclose(truth.depth[0].numpy()[inside], depth[inside], rtol=1e-10)
            for layers, wanted in zip(seen, (u, v), strict=True):
                found = layers.watch()(step)[0].numpy() * 64 - 1
                np.testing.assert_allclose(found[inside], wanted[inside], atol=1e-8)


def test_parallax_is_focal_length_times_speed_over_depth():
    speed, seconds = np.array([0.4, -0.25, 0.0]), 0.2
    for depth in (1.5, 3.0, 6.0):
        a, b = np.array([0.02 * depth, 0, 0]), np.array([0, 0.02 * depth, 0])
        corner = np.array([0, 0, depth]) - 29.5 * a - 29.5 * b
        matrix = homography(corner, a, b, [np.eye(3)] * 2, [np.zeros(3), speed * seconds])
        for axis, ramp in enumerate(ramps(60, 60)):
            before, after = (scene(Layer(ramp, None, matrix)).watch()(step)[0].numpy() for step in range(2))
            slope = np.diff(before, axis=1 - axis).mean()
            # The picture keeps its brightness where it goes: flow = -change / slope.
            flow = -(after - before) / slope / seconds
            np.testing.assert_allclose(flow, -FOCAL * speed[axis] / depth, atol=1e-9)


def test_rotation_alone_moves_all_depths_alike():
    turned = np.stack([np.eye(3), turn([0.05, -0.1, 0.2])])
    moved = []
    for depth in (1.0, 4.0, 20.0):
        a, b = np.array([0.02 * depth, 0, 0]), np.array([0, 0.02 * depth, 0])
        matrix = homography(np.array([0, 0, depth]) - 29.5 * (a + b), a, b, turned, np.zeros((2, 3)))
        pictures = [scene(Layer(ramp, None, matrix)).watch() for ramp in ramps(60, 60)]
        origin = [float(see(0)[0, 0, 0]) for see in pictures]
        slopes = [float(see(0)[0, axis, 1 - axis]) - float(see(0)[0, 0, 0]) for axis, see in enumerate(pictures)]
        # Where each pixel's texel was before the camera turned.
        moved.append([(see(1)[0].numpy() - at) / slope for see, at, slope in zip(pictures, origin, slopes)])
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rays = np.stack([(x - CAMERA[0, 2]) / FOCAL, (y - CAMERA[1, 2]) / FOCAL, np.ones(x.shape)], axis=-1) @ turned[1]
    wanted = [rays[..., axis] / rays[..., 2] * FOCAL + CAMERA[axis, 2] for axis in range(2)]
    assert np.abs(wanted[0] - x).max() > 1
    for found in moved:
        np.testing.assert_allclose(found, wanted, atol=1e-8)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([[values]], dtype=torch.float64)


def test_light_and_truth_by_hand():
    """Far to near: 0.2, then 0.8 by an opacity of 0, 0.4, 0.5, 0.6, 1, then 0.1 by 0, 0, 0.25, 0.75, 0."""
    layers = scene(
        Layer(row(0.2, 0.2, 0.2, 0.2, 0.2), None, flat(5.0)),
        Layer(row(0.8, 0.8, 0.8, 0.8, 0.8), row(0, 0.4, 0.5, 0.6, 1), flat(3.0)),
        Layer(row(0.1, 0.1, 0.1, 0.1, 0.1), row(0, 0, 0.25, 0.75, 0), flat(2.0)),
        size=(1, 5),
    )
    # 0.2 + 0.4 * 0.6 = 0.44; 0.2 + 0.5 * 0.6 = 0.5, then 0.5 - 0.25 * 0.4 = 0.4; 0.56 - 0.75 * 0.46 = 0.215
    torch.testing.assert_close(layers.watch()(0), row(0.2, 0.44, 0.4, 0.215, 0.8), rtol=0, atol=1e-12)
    truth = layers.truth(0)
    # Exactly half opaque is not enough; the nearest that is more than half opaque counts.
    assert truth.layer.tolist() == [[[0, 0, 0, 2, 1]]]
    torch.testing.assert_close(truth.depth, row(5.0, 5, 5, 2, 3), rtol=0, atol=1e-12)


def test_haze_takes_contrast_with_distance():
    wall, card = torch.full((1, HEIGHT, WIDTH), 0.9).double(), torch.full((1, HEIGHT, WIDTH), 0.1).double()
    alpha = torch.full_like(card, 0.75)
    clear = (Layer(wall, None, flat(6.0)), Layer(card, alpha, flat(2.0)))
    seen = Layers(clear, torch.arange(1), HEIGHT, WIDTH, haze=0.3, airlight=0.6).watch()(0)[0, 2, 2].item()
    far, near = (0.6 + (light - 0.6) * np.exp(-0.3 * depth) for light, depth in ((0.9, 6.0), (0.1, 2.0)))
    assert seen == pytest.approx(0.25 * far + 0.75 * near, abs=1e-7)


def test_the_nearest_is_seen_and_measured():
    """Two cards that overlap by half: brightness, layer and depth tell the same story at every pixel."""
    wall = torch.full((1, HEIGHT, WIDTH), 0.25, dtype=torch.float64)
    far, near = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.float64)
    far[:, 1:6, 1:7], near[:, 3:8, 4:10] = 1, 1
    layers = scene(
        Layer(wall, None, flat(9.0)),
        Layer(2 * wall, far, flat(4.0)),
        Layer(3 * wall, near, flat(2.0)),
    )
    truth, seen = layers.truth(0), layers.watch()(0)
    wanted = torch.where(near > 0, 2, torch.where(far > 0, 1, 0))
    assert torch.equal(truth.layer, wanted) and set(wanted.unique().tolist()) == {0, 1, 2}
    torch.testing.assert_close(truth.depth, torch.tensor([9.0, 4, 2], dtype=torch.float64)[wanted])
    torch.testing.assert_close(seen, 0.25 * (wanted + 1.0).double())


def test_see_through_texels_do_not_bleed():
    """Half a texel beyond a card's edge its colour is still its own, whatever colour see-through texels have."""
    alpha = torch.tensor([[[0.0, 1.0, 1.0, 0.0]]], dtype=torch.float64)
    shifted = flat(2.0).clone()
    shifted[..., 0, 2] = 0.5 / 2  # pixel x looks at u = x + 0.5
    wall = Layer(torch.zeros(1, 1, 4, dtype=torch.float64), None, flat(9.0))
    for hidden in (0.0, 1.0):
        texture = torch.tensor([[[hidden, 0.6, 0.6, hidden]]], dtype=torch.float64)
        seen = scene(wall, Layer(texture, alpha, shifted), size=(1, 4)).watch()(0)
        torch.testing.assert_close(seen.flatten(), torch.tensor([0.3, 0.6, 0.3, 0.0], dtype=torch.float64))


def test_horizon_and_behind_the_camera():
    """A floor that ends at its horizon, a card that the camera has passed, and one that it passes through."""
    texture = torch.rand(1, 60, 20, generator=seeded()).double()
    a, b = np.array([0.2, 0, 0]), np.array([0, 0, 0.2])
    corner = np.array([-2.0, 1.0, 0.5])
    poses = [np.eye(3)] * 3, [np.zeros(3), np.array([0, 0, 1.9]), np.array([0, 0, 3.0])]
    floor = Layer(texture, torch.ones_like(texture), homography(corner, a, b, *poses))
    # Its first texel is on the optical axis: behind the camera its (u, v) / Z is (0, 0), which no clamp moves away.
    card = Layer(texture, torch.ones_like(texture), homography(
        np.array([0.0, 0.0, 2.0]), np.array([0.2, 0, 0.0]), np.array([0.0, 0.2, 1e-6]), *poses))  # fmt: skip
    wall = Layer(texture, None, flat(50.0, 3))
    layers = scene(wall, floor)
    check_finite(layers)
    for step in range(2):
        u, v, depth = cast(corner, a, b, poses[0][step], poses[1][step])
        inside = (u > 0.5) & (u < 18.5) & (v > 0.5) & (v < 58.5)
        found = layers.truth(step).layer[0].numpy()
        assert inside.any() and (found[inside] == 1).all()
        # Above the horizon, in the middle row, there is no floor: rays do not meet it before the camera.
        assert np.isnan(depth[: HEIGHT // 2]).all() and (found[: HEIGHT // 2 + 1] == 0).all()
    whole = scene(wall, card)
    assert (whole.truth(0).layer == 1).any() and (whole.truth(2).layer == 0).all()
    assert torch.equal(whole.watch()(2), scene(wall).watch()(2))
    check_finite(scene(wall, card, floor))
    check_finite(scene(Layer(texture, None, floor.homography)))  # a background that ends at its horizon, too
    for dtype in (torch.float32, torch.float64):
        check_finite(scene(Layer(texture.to(dtype), None, floor.homography.to(dtype))))


# ---- events -----------------------------------------------------------------------------------------


def shifts(steps: int) -> np.ndarray:
    t = np.arange(steps)
    return np.stack([0.31 * t, 0.4 * np.sin(0.9 * t)], axis=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_flat_scene_is_a_still_image(dtype):
    images = torch.rand(2, 20, 24, generator=seeded(3), dtype=torch.float64).to(dtype)
    t_us = torch.arange(13) * 4000
    shift = torch.from_numpy(shifts(13)).to(dtype).expand(2, -1, -1)
    path = CameraPath.from_shifts(t_us, shift, image_size=(20, 24), sensor_size=(HEIGHT, WIDTH))
    layers = Layers((Layer(images, None, path.homography / 3.0),), t_us, HEIGHT, WIDTH)
    size = {"height": HEIGHT, "width": WIDTH}
    found = simulate_view(layers, sensor=SHARP, seeds=[5, 6])
    wanted = simulate_events(images, path, sensor=SHARP, seeds=[5, 6], outside="reflection", **size)
    for own, other in zip(found, wanted, strict=True):
        assert len(other) > 300
        if dtype == torch.float64:
            for name in "txyp":
                assert np.array_equal(getattr(own, name), getattr(other, name))
        else:
            assert abs(len(own) - len(other)) < 0.01 * len(other)


def test_blur_of_the_view_is_blur_of_the_still_inside():
    """With a pixel a pixel, moving and blurring swap, but for the sensor's border."""
    sensors = [SensorModel(response="linear", threshold=0.1, blur_px=0.7)]
    image = torch.rand(1, 30, 34, generator=seeded(4), dtype=torch.float64)
    t_us = torch.arange(5) * 1000
    shift = torch.from_numpy(shifts(5))[None]
    path = CameraPath.from_shifts(t_us, shift, image_size=(30, 34), sensor_size=(HEIGHT, WIDTH))
    stills = stepping.Stills(image, path, height=HEIGHT, width=WIDTH, outside="border").watch(slice(0, 1), sensors)
    seen = Layers((Layer(image, None, path.homography),), t_us, HEIGHT, WIDTH).watch(slice(0, 1), sensors)
    sharp = Layers((Layer(image, None, path.homography),), t_us, HEIGHT, WIDTH).watch(slice(0, 1))
    for step in range(5):
        inside = (slice(None), slice(3, -3), slice(3, -3))
        torch.testing.assert_close(seen(step)[inside], stills(step)[inside], rtol=0, atol=1e-12)
        assert (seen(step)[inside] - sharp(step)[inside]).abs().max() > 0.05


def moving(steps: int = 9, batch: int = 1) -> Layers:
    """A card that the camera passes before a wall that is grey on the left and white beyond column 9."""
    wall = torch.full((batch, HEIGHT, WIDTH), 0.4)
    texture = torch.rand(batch, 4, 4, generator=seeded(1))
    corner, a, b = np.array([-0.6, -0.4, 2.0]), np.array([0.15, 0, 0]), np.array([0, 0.15, 0])
    place = np.stack([np.linspace(0, 0.4, steps), np.zeros(steps), np.zeros(steps)], axis=1)
    matrix = homography(corner, a, b, [np.eye(3)] * steps, place).float().expand(batch, -1, -1, -1)
    card = Layer(texture, torch.ones_like(texture), matrix)
    still = flat(5.0, steps, torch.float32).expand(batch, -1, -1, -1)
    return Layers((Layer(wall, None, still), card), torch.arange(steps) * 5000, HEIGHT, WIDTH)


def test_events_only_where_brightness_changes():
    layers = moving()
    (events,) = simulate_view(layers, sensor=QUIET, seeds=[0])
    see = layers.watch()
    frames = torch.stack([see(step)[0] for step in range(len(layers.t_us))])
    still = (frames == frames[0]).all(dim=0)
    fired = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    fired[events.y.astype(int), events.x.astype(int)] = True
    assert 20 < still.sum() < HEIGHT * WIDTH - 20 and not (fired & still).any()
    # And each pixel whose brightness ends off by two thresholds did fire, the way it changed.
    change = (frames[-1] + QUIET.log_offset).log() - (frames[0] + QUIET.log_offset).log()
    assert fired[change.abs() > 2 * QUIET.threshold].all() and (change.abs() > 2 * QUIET.threshold).sum() > 5
    resting = Layers(tuple(Layer(one.texture, one.alpha, one.homography[:, :1].expand(-1, 9, -1, -1))
                           for one in layers.layers), layers.t_us, HEIGHT, WIDTH)  # fmt: skip
    (nothing,) = simulate_view(resting, sensor=QUIET, seeds=[0])
    assert len(nothing) == 0


def test_a_recording_depends_on_its_own_seed_alone(monkeypatch):
    layers = moving(batch=5)
    sensors = [SensorModel(threshold=0.1, blur_px=0.3 * number, shot_noise_hz=20.0) for number in range(5)]
    seeds = [3, 3, 7, 8, 9]
    whole = simulate_view(layers, sensor=sensors, seeds=seeds)
    monkeypatch.setitem(stepping.CHUNK_PIXELS, "cpu", 2 * HEIGHT * WIDTH)
    chunked = simulate_view(layers, sensor=sensors, seeds=seeds)
    for number, events in enumerate(whole):
        part = slice(number, number + 1)
        parts = tuple(Layer(one.texture[part], None if one.alpha is None else one.alpha[part], one.homography[part])
                      for one in layers.layers)  # fmt: skip
        (alone,) = simulate_view(
            Layers(parts, layers.t_us, HEIGHT, WIDTH), sensor=sensors[number], seeds=[seeds[number]]
        )
        assert len(events) > 20
        for other in (chunked[number], alone):
            for name in "txyp":
                assert np.array_equal(getattr(events, name), getattr(other, name))
    assert not np.array_equal(whole[2].t, whole[3].t)


def test_truth_and_light_of_a_part():
    layers = moving(batch=4)
    part = slice(1, 3)
    assert torch.equal(layers.watch(part)(4), layers.watch()(4)[part])
    assert torch.equal(layers.truth(4, part).depth, layers.truth(4).depth[part])
    assert torch.equal(layers.truth(4, part).layer, layers.truth(4).layer[part])


def test_nmnist_sensor_on_layers_gives_sorted_valid_events():
    for events in simulate_view(moving(batch=2), sensor=NMNIST_SENSOR, seeds=[1, 2]):
        events.validate()
        assert events.height == HEIGHT and events.width == WIDTH and (events.t < 40_000).all()


def test_refusals():
    texture, matrix = torch.zeros(1, 4, 4), flat(2.0, 3)
    with pytest.raises(ValueError, match="background"):
        scene(Layer(texture, torch.ones_like(texture), matrix))
    with pytest.raises(ValueError, match="background"):
        Layers((), torch.arange(3), 4, 4)
    with pytest.raises(ValueError, match=r"1 scenes and 2 times"):
        Layers((Layer(texture, None, matrix),), torch.arange(2), 4, 4)
