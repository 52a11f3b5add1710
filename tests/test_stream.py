"""Streaming: equal to the whole sequence however events arrive, within a span its limited twin, in bounded memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from gep.events.represent import Histogram, TimeSurface, VoxelGrid
from gep.events.slicing import by_duration
from gep.events.types import EventFormatError, Events
from gep.hub import GEPModel
from gep.models import Backbone, EventEncoder, KVCache
from gep.stream import EventStream, StreamedWindow
from tests.test_hub import settings

WINDOW_US, START, SENSOR = 50_000, 1_700_000_000_000_000, (30, 40)
NAMES = ("tokens", "pooled", "hidden", "next", "image")


def recording(windows: float = 6, count: int = 3000, seed: int = 0) -> Events:
    g = np.random.default_rng(seed)
    t = START + g.integers(0, int(windows * WINDOW_US), count)
    t[: int(windows)] = START + WINDOW_US * np.arange(int(windows))  # the first, and one on every edge
    t.sort()
    x, y, p = g.integers(0, SENSOR[1], count), g.integers(0, SENSOR[0], count), g.integers(0, 2, count)
    return Events.from_arrays(t, x, y, p, height=SENSOR[0], width=SENSOR[1])


def make(represent=None, *, order="frame", span=None, depth=2, backbone=True, **changes) -> GEPModel:
    torch.manual_seed(0)
    represent = represent or Histogram(log1p=True)
    encoder = EventEncoder("nano", represent.channels, (36, 36))
    stack = Backbone(96, width=48, depth=depth, heads=2, order=order, span=span) if backbone else None
    model = GEPModel.from_parts(encoder, represent, settings(fit="resize", **changes), backbone=stack).eval()
    for p in model.parameters():  # larger than at the start, so that every path shows in the output
        p.data += 0.05 * torch.randn(p.shape)
    return model


def streamed(stream: EventStream, events: Events, cuts) -> list[StreamedWindow]:
    """All windows, from pushes that end at the given indices; what a push gave is not looked at again."""
    found, edges = [], [0, *cuts, len(events)]
    for begin, end in pairwise(edges):
        found += stream.push(events[begin:end])
    return [*found, *stream.finish()]


def assert_equal(windows: list[StreamedWindow], model: GEPModel, events: Events, bounds: np.ndarray) -> None:
    out = model.predict(events, bounds=bounds)
    assert [[window.t0_us, window.t1_us] for window in windows] == bounds.tolist()
    for name in NAMES:
        want, got = getattr(out, name), [getattr(window, name) for window in windows]
        if want is None:
            assert got == [None] * len(windows)
        else:
            torch.testing.assert_close(torch.stack(got), want[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("order", ["frame", "token"])
@pytest.mark.parametrize(
    "represent", [Histogram(log1p=True), VoxelGrid(3), TimeSurface()], ids=lambda r: type(r).__name__
)
def test_however_events_arrive_the_whole_sequence_comes_out(order, represent):
    events, model = recording(5.3), make(represent, order=order)
    bounds = by_duration(events, WINDOW_US).bounds
    g = np.random.default_rng(1)
    edges = np.searchsorted(events.t, bounds[1:, 0])
    ways = {
        "at once": [],
        "windows": edges,
        "up to the first event of the next": edges + 1,
        "anyhow": np.sort(g.choice(len(events), 40)),  # several windows, parts of one, and nothing at all
        "small": np.arange(0, len(events), 60),
    }
    found = {name: streamed(model.stream(*SENSOR), events, cuts) for name, cuts in ways.items()}
    for windows in found.values():
        assert_equal(windows, model, events, bounds)
        assert all(torch.equal(a, b) for one, two in zip(windows, found["at once"]) for a, b in zip(one[:5], two[:5]))
        assert sum(window.num_events for window in windows) == len(events)
    assert (found["at once"][3].hidden - make(represent, order=order).predict(events[edges[2] : edges[3]], windows=1)
            .hidden[0, 0]).abs().max() > 1e-2  # fmt: skip  # the context matters


@pytest.mark.parametrize("order", ["frame", "token"])
@pytest.mark.parametrize("span", [1, 3])
def test_beyond_the_span_it_is_a_whole_sequence_with_limited_attention(order, span):
    events, model = recording(9), make(order=order)
    bounds = by_duration(events, WINDOW_US).bounds
    windows = streamed(model.stream(*SENSOR, span=span), events, np.arange(0, len(events), 700))
    limited = make(order=order, span=span)
    limited.load_state_dict(model.state_dict())
    assert_equal(windows, limited, events, bounds)
    # It is the backbone's own span if it has one, and else the number of windows in training.
    assert limited.stream(*SENSOR).span == span
    default = streamed(limited.stream(*SENSOR), events, [])
    assert all(torch.equal(a, b) for one, two in zip(windows, default) for a, b in zip(one[:5], two[:5]))
    assert model.stream(*SENSOR).span == model.input_settings["windows"] == 6
    whole = model.predict(events, bounds=bounds).hidden[0]
    close = [(a.hidden - b).abs().max() < 1e-4 for a, b in zip(windows, whole)]
    assert close == [True] * span + [False] * (9 - span)


def test_one_layer_sees_the_last_windows_and_no_others():
    # Independent of any mask: with one layer a limited run is a run of the last windows alone.
    events, model = recording(7), make(depth=1)
    bounds = by_duration(events, WINDOW_US).bounds
    for k, window in enumerate(streamed(model.stream(*SENSOR, span=3), events, [])):
        alone = model.predict(events, bounds=bounds[max(0, k - 2) : k + 1])
        torch.testing.assert_close(window.image, alone.image[0, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_position_does_not_wear_off(depth):
    # After (span - 1) * depth + 1 frames nothing of the past is left: then it is a stream that has just begun,
    # although the angles count from a frame a month ago.
    torch.manual_seed(0)
    backbone, span = Backbone(10, width=24, depth=depth, heads=2).eval(), 3
    tokens = torch.randn(1, 12, 6, 10)
    t_us = torch.arange(12)[None] * WINDOW_US + START
    month = 30 * 24 * 3_600_000_000

    def run(cache: KVCache, times: torch.Tensor) -> list[torch.Tensor]:
        steps = zip(tokens.split(1, dim=1), torch.zeros_like(times).split(1, dim=1), times.split(1, dim=1))
        return [backbone(*step, (2, 3), cache=cache).hidden for step in steps]

    cache = KVCache(span=span)
    backbone(torch.randn(1, 2, 6, 10), torch.zeros(1, 2, dtype=torch.int64), t_us[:, :2] - month, (2, 3), cache=cache)
    late, fresh = run(cache, t_us), run(KVCache(span=span), t_us)
    seen = (span - 1) * depth + 1
    assert (late[0] - fresh[0]).abs().max() > 1e-3
    for got, want in zip(late[seen - 1 :], fresh[seen - 1 :]):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_memory_is_bounded():
    model = make()
    events = recording(40, count=8000)
    stream, sizes = model.stream(*SENSOR, span=4), []
    for part in range(0, 8000, 100):
        for _ in stream.push(events[part : part + 100]):
            held = [tensor.untyped_storage().nbytes() for layer in stream._cache.layers for tensor in layer]
            sizes.append((sum(held), stream._cache.num_frames))
    window = 2 * 2 * 36 * 48 * 4  # layers, keys and values, tokens, width, bytes
    assert sizes[5:] == [sizes[5]] * len(sizes[5:]) and sizes[5][1] == 3 and sizes[5][0] <= 4 * window
    assert sum(len(part) for part in stream._held) < 400
    assert all(part.t.base is None for part in stream._held)  # a view would keep its push alive


def test_what_is_not_taken_comes_later_and_pushed_memory_may_be_reused():
    events, model = recording(6), make()
    want = streamed(model.stream(*SENSOR), events, [])
    stream, buffer = model.stream(*SENSOR), np.empty(700, np.int64)
    got = []
    for begin in range(0, len(events), 700):
        part = events[begin : begin + 700]
        buffer[: len(part)] = part.t
        windows = stream.push(Events(buffer[: len(part)], part.x, part.y, part.p, *SENSOR))
        buffer[:] = -1
        if begin == 1400:
            got.append(next(windows))
    got += stream.finish()
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for one, two in zip(want, got) for a, b in zip(one[:5], two[:5]))


def test_pauses_begins_and_ends():
    events, model = recording(2), make()
    first = int(events.t[0])
    pause = Events(np.where(events.t < first + WINDOW_US, events.t, events.t + 3 * WINDOW_US), *[
        getattr(events, name) for name in "xyp"], *SENSOR)  # fmt: skip
    stream = model.stream(*SENSOR, span=7)
    assert [*stream.advance(first - 5)] == []  # no window begins before the first event
    found = [*stream.push(pause)]
    assert [window.num_events > 0 for window in found] == [True, False, False, False]
    found += stream.advance(first + 7 * WINDOW_US)
    assert [window.t1_us for window in found] == [first + k * WINDOW_US for k in range(1, 8)]
    assert_equal(found, model, pause, np.array([[window.t0_us, window.t1_us] for window in found]))
    assert [*stream.finish()] == []
    with pytest.raises(ValueError, match="finished"):
        stream.push(events)
    # A begin of one's own; time alone makes windows then. One event at the very begin of a window makes another.
    stream = model.stream(*SENSOR, t0_us=first - 2 * WINDOW_US)
    assert [window.num_events for window in stream.advance(first - 1)] == [0]
    assert [window.num_events for window in stream.push(events[:1])] == [0]
    assert [window.t0_us for window in stream.finish()] == [first]
    assert [*model.stream(*SENSOR).finish()] == []


def test_without_a_backbone_and_without_its_cost():
    events, full, plain = recording(3), make(), make(backbone=False)
    bounds = by_duration(events, WINDOW_US).bounds
    assert_equal(streamed(plain.stream(*SENSOR), events, [100]), plain, events, bounds)
    full.backbone.forward = None
    windows = streamed(full.stream(*SENSOR, backbone=False), events, [])
    torch.testing.assert_close(torch.stack([w.tokens for w in windows]), full.encode(events, bounds).tokens[0])
    assert windows[0].image is None


def test_modes_stay_and_no_gradients_flow():
    model, events = make().train(), recording(2)
    model.encoder.eval()
    windows = streamed(model.stream(*SENSOR), events, [])
    assert model.training and model.backbone.training and not model.encoder.training
    assert not any(tensor.requires_grad for tensor in windows[-1][:5])
    assert_equal(windows, model, events, by_duration(events, WINDOW_US).bounds)


def test_errors_name_the_fault():
    events, model = recording(2), make()
    stream = model.stream(*SENSOR)
    stream.push(events[1000:])
    with pytest.raises(ValueError, match=rf"first pushed event is at {events.t[0]} µs, before {events.t[-1]}"):
        stream.push(events[:1])
    with pytest.raises(ValueError, match="advance is at 5 µs"):
        stream.advance(5)
    with pytest.raises(ValueError, match="30x40 sensor in a stream of 40x30"):
        model.stream(40, 30).push(events)
    with pytest.raises(EventFormatError, match="pushed events: event 1"):
        model.stream(*SENSOR).push(Events(events.t[:2][::-1], events.x[:2], events.y[:2], events.p[:2], *SENSOR))
    with pytest.raises(ValueError, match="no fixed length"):
        make(window_us=0).stream(*SENSOR)
    assert make(window_us=0).stream(*SENSOR, window_us=20).window_us == 20
    with pytest.raises(ValueError, match="span = 0"):
        model.stream(*SENSOR, span=0)
    with pytest.raises(ValueError, match="at most 4"):
        make(span=4).stream(*SENSOR, span=5)
    with pytest.warns(UserWarning, match="num_events = 9"):
        make(num_events=9).stream(*SENSOR)
    with pytest.warns(UserWarning, match="span = 3"):
        make(backbone=False).stream(*SENSOR, span=3)
