"""Colours, legends and sheets: values that can be read back from the pixels, and nothing drawn over a panel."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from downstream.dense.pictures import (
    NONE,
    ClassLegend,
    DepthLegend,
    Sheet,
    metres_text,
    shortened,
    text_width,
    viridis,
)
from downstream.segmentation.palette import COLOURS, IGNORE, _by_sight, colourise, distances, palette
from gep.data.ddd17 import CLASSES as DDD17
from gep.data.dsec import CLASSES as DSEC
from gep.events.render import write_film


def nearest_pair(classes: tuple[str, ...]) -> float:
    colours = np.concatenate([palette(classes), np.array([IGNORE], np.uint8)])
    apart = distances(colours, colours)
    return float(apart[~np.eye(len(colours), dtype=bool)].min())


def test_distances_are_cielab_for_the_worst_eye():
    ends = np.array([[0, 0, 0], [255, 255, 255]])
    assert distances(ends, ends)[0, 1] == pytest.approx(100, abs=0.05)
    # sRGB red is L* 53.24, a* 80.09, b* 67.20 and green L* 87.73, a* -86.18, b* 83.18, 170.6 apart for most eyes.
    red_green = np.array([[255, 0, 0], [0, 255, 0]])
    assert 10 < distances(red_green, red_green)[0, 1] < 100
    blue = np.array([[0, 0, 255]])  # L* 32.30, a* 79.19, b* -107.86
    assert _by_sight(red_green, red_green)[0, 0, 1] == pytest.approx(170.57, abs=0.1)
    assert _by_sight(blue, ends[:1])[0, 0, 0] == pytest.approx(137.65, abs=0.1)


def test_classes_are_told_apart_also_without_the_red_or_the_green_cones():
    assert nearest_pair(DSEC) >= 20 and nearest_pair(DDD17) >= 20
    assert nearest_pair(("background", *"0123456789")) >= 15
    assert set(DSEC) == set(COLOURS) and tuple(palette(DSEC)[8]) == COLOURS["car"]
    assert tuple(palette(DDD17)[5]) == COLOURS["car"] and tuple(palette(["traffic_sign"])[0]) == COLOURS["traffic sign"]


def test_other_classes_get_colours_that_no_other_has():
    many = palette([f"kind {number}" for number in range(60)])
    assert len(np.unique(np.concatenate([many, [IGNORE]]), axis=0)) == 61
    assert np.array_equal(many, palette([f"other {number}" for number in range(60)]))
    both = palette(["road", "flat", "mine", "car"])  # road and flat would share one
    assert len(np.unique(both, axis=0)) == 4 and tuple(both[0]) == COLOURS["road"]
    assert palette([]).shape == (0, 3)


def test_ids_become_their_colours_and_all_else_the_ignored_one():
    colours = palette(DDD17)
    picture = colourise(np.array([[0, 5], [255, 6]], np.uint8), colours)
    assert picture.tolist() == [[colours[0].tolist(), colours[5].tolist()], [list(IGNORE), list(IGNORE)]]
    assert colourise(np.array([[-1]]), colours).tolist() == [[list(IGNORE)]]
    with pytest.raises(ValueError, match="6 colours for 2 classes"):
        ClassLegend(["a", "b"], colours)


def test_viridis_is_matplotlibs():
    matplotlib = pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    exact = np.round(255 * np.array(matplotlib.colormaps["viridis"].colors))
    assert np.abs(viridis(np.linspace(0, 1, 256)) - exact).max() <= 5
    assert viridis(np.array([-1.0, 2.0])).tolist() == [[68, 1, 84], [253, 231, 37]]


def test_depth_is_placed_by_its_logarithm():
    legend = DepthLegend(2.0, 80.0)
    assert legend.place([2, 80, np.sqrt(160)]) == pytest.approx([1, 0, 0.5])
    picture = legend.picture(np.array([[2.0, 80.0, np.nan, 0.0, 1.0]]))[0].tolist()
    assert picture == [[253, 231, 37], [68, 1, 84], list(NONE), list(NONE), [253, 231, 37]]
    assert legend.ticks() == [2, 5, 10, 20, 50, 80]
    assert DepthLegend(1.97, 80.0).ticks()[:2] == [1.97, 2]
    assert [metres_text(value) for value in (1.97, 80, 1000, 0.25)] == ["2 m", "80 m", "1000 m", "0.25 m"]
    with pytest.raises(ValueError, match="no range"):
        DepthLegend(5, 5)


@pytest.mark.parametrize("sensor, zoom", [((34, 34), 8), ((100, 120), 3), ((260, 346), 1)])
@pytest.mark.parametrize("kind", ["classes", "depth"])
def test_a_sheet_shows_its_panels_pixel_for_pixel(sensor, zoom, kind):
    rng = np.random.default_rng(0)
    legend = ClassLegend(DSEC, palette(DSEC)) if kind == "classes" else DepthLegend(2, 80)
    sheet = Sheet(sensor, ("events", "segmentation", "ground truth"), legend)
    panels = [rng.integers(0, 256, (*sensor, 3), dtype=np.uint8) for _ in range(3)]
    page = sheet.draw(panels, "a very long name of a recording " * 9, "AbsRel 0.123, RMSE 4.56 m (cut-off 80 m)")
    assert page.shape == (*sheet.shape, 3) and sheet.zoom == zoom
    for number, panel in enumerate(panels):
        # Each is found whole where the sheet's frame says it is, so that nothing is drawn over it.
        left, top = sheet._left(number), sheet._top
        found = page[top : top + zoom * sensor[0], left : left + zoom * sensor[1]]
        assert np.array_equal(found[::zoom, ::zoom], panel) and np.array_equal(found[zoom - 1 :: zoom, ::zoom], panel)
    empty = sheet.draw([np.full((*sensor, 3), 255, np.uint8)] * 3)
    key = empty[sheet._top + zoom * sensor[0] + 2 :].reshape(-1, 3)
    for colour in legend.colours if kind == "classes" else legend.colours[[0, 64, 127]]:
        assert (np.abs(key.astype(int) - colour).max(axis=1) <= 3).any(), colour
    assert (empty[:, [0, -1]] == 255).all() and (empty[[0, -1]] == 255).all()  # no text is cut off at an edge


def test_the_key_wraps_and_never_leaves_the_page():
    names = [f"a class of the name {number}" for number in range(12)]
    legend = ClassLegend([*names, "x" * 200], palette([*names, "x"]))
    key = np.asarray(legend.draw(300, 14))
    assert key.shape[1] == 300 and (key[:, -1] == 255).all()
    assert key.shape[0] > 12 * 14
    assert text_width(shortened("x" * 200, 14, 100), 14) <= 100 and shortened("fits", 14, 100) == "fits"
    bar = np.asarray(DepthLegend(1.97, 80).draw(300, 14))
    assert (bar[:, 0] == 255).all() and (bar[:, -1] == 255).all()


def test_a_gif_keeps_the_colours(tmp_path):
    sheet = Sheet((40, 60), ("events", "segmentation"), ClassLegend(DSEC, palette(DSEC)))
    assert len(sheet.palette) <= 256 and len(Sheet((9, 9), ("a",), DepthLegend(1, 9)).palette) <= 256
    mask = np.arange(2400).reshape(40, 60) % 12
    panels = [np.full((40, 60, 3), 255, np.uint8), sheet.legend.picture(mask)]
    pages = [sheet.draw(panels, f"t = {number}") for number in range(3)]
    write_film(tmp_path / "a.gif", iter(pages), 10, palette=sheet.palette)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
        film.seek(2)
        seen = np.asarray(film.convert("RGB"))
    left, top, zoom = sheet._left(1), sheet._top, sheet.zoom
    found = seen[top : top + 40 * zoom : zoom, left : left + 60 * zoom : zoom]
    assert np.array_equal(found, panels[1]) and (seen[2, 2] == 255).all()
    assert np.abs(seen.astype(int) - pages[2]).max() < 40  # greys of letters are rounded


def test_grids_of_the_report():
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    from gep.demo.figures_dense import depth_grid, segmentation_grid

    rng = np.random.default_rng(0)
    events, images = np.ones((2, 30, 40, 3)), rng.random((2, 30, 40))
    truth = np.zeros((2, 30, 40), int)
    truth[:, 10:20, 10:20], truth[:, :5] = 3, 255
    made = {"scratch": truth % 2, "stage 1": truth, "stage 2": truth}
    wide = read(segmentation_grid(events, truth, made, DSEC, ["one", "two"], images=images, title="all"))
    narrow = read(segmentation_grid(events, truth, made, DSEC, ["one", "two"]))
    assert wide.shape[1] > narrow.shape[1]
    counts = {name: int((narrow == colour).all(axis=2).sum()) for name, colour in zip(DSEC, palette(DSEC))}
    assert counts["background"] > counts["person"] > 1000 and counts["building"] > 1000
    assert max(counts[name] for name in ("car", "road", "wall")) == 0  # in none of the maps, so not in the key
    depth = np.full((2, 30, 40), 20.0)
    depth[:, :10] = np.nan
    page = read(depth_grid(events, depth, {"stage 1": depth}, ["one", "two"], near_m=2, far_m=80))
    own = DepthLegend(2, 80).picture(np.array([[20.0]]))[0, 0].astype(int)
    assert (np.abs(page.astype(int) - own).max(axis=2) <= 6).sum() > 10_000
    assert (page == NONE).all(axis=2).sum() > 5000


def read(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
