"""A few hundred inputs of `make fuzz`, its watch over crashes and hangs, and properties of writers and readers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gep.events.io import FORMATS, open_events, read_events
from gep.events.io.source import InMemory
from gep.events.types import EventFormatError, Events
from tests.fuzz import check, mutate, run, seeds

WRITERS = [form for form in FORMATS if form.write is not None]
MAGIC = (
    b"",
    b"\x93NUMPY\x01\x00",
    b"PK\x03\x04",
    b"#!AER-DAT2.0\r\n",
    b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n",
    b"#!AER-DAT4.0\r\n\x20\x00\x00\x00\x10\x00\x00\x00IOHE",
    b"Event Stream\x02\x00\x00\x01\x20\x00\x20\x00",
    b"Event Stream\x02\x00\x00\x02\x20\x00\x20\x00",
    b"% evt 2.0\n% geometry 64x64\n% end\n",
    b"% evt 2.1\n% geometry 64x64\n% end\n",
    b"% evt 3.0\n% geometry 64x64\n% end\n",
    b"% Data file containing CD events.\n% Width 64\n% Height 64\n\x00\x08",
    b"\x89HDF\r\n\x1a\n",
    b"ARROW1\x00\x00",
    b"t x y p\n",
    b"64 64\n",
)


def test_a_few_hundred_inputs():
    report = run.fuzz(300, workers=1)
    assert not report.failures, "\n".join(f"--only {number}: {text}" for number, text in report.failures.items())
    assert report.inputs == 300
    kinds = {kind for _, kind in report.outcomes}
    assert kinds == {"events", "recovered", "error"}  # the mutations reach all of them


@pytest.mark.slow
@pytest.mark.parametrize("plant, found", [("abort", "the process died"), ("hang", "no answer in 3 s")])
def test_a_crash_and_a_hang_have_a_number(plant, found):
    report = run.fuzz(6, workers=1, plant=plant, silent=3.0)
    assert list(report.failures) == [2] and found in report.failures[2]
    assert report.inputs == 5  # those behind the fault ran too


@pytest.mark.slow
def test_memory_growth_is_seen():
    report = run.fuzz(420, workers=1, plant="leak")
    assert any("memory grew by" in text for text in report.failures.values())


def test_inputs_follow_from_their_number():
    found = seeds.collect()
    again = seeds.collect()
    assert [seed.files for seed in found] == [seed.files for seed in again]
    for number in range(60):
        first, second = mutate.mutated(found, 3, number), mutate.mutated(again, 3, number)
        assert first == second
    assert mutate.mutated(found, 3, 7) != mutate.mutated(found, 4, 7)


class _Broken(InMemory):
    """A source with one fault."""

    def __init__(self, path, fault):
        super().__init__(path, seeds.events(50, 8, 8))
        self.fault = fault

    def read(self) -> Events:
        t, x, y, p = (getattr(self.events, name).copy() for name in "txyp")
        if self.fault == "order":
            t[10] = t[9] - 1
        if self.fault == "bounds":
            x[10] = 8
        return Events(t, x, y, p, 8, 8)

    def by_time(self, t0, t1) -> Events:
        return super().by_time(t0, t1 + 1 if self.fault == "slice" else t1)

    def by_index(self, start, stop) -> Events:
        return super().by_index(start, stop)[: -1 if self.fault == "index" else None]

    @property
    def span(self):
        first, last = super().span
        return first, last + (self.fault == "span")


@pytest.mark.parametrize("fault", ["order", "bounds", "slice", "index", "span", "error", "unnamed", "panic", "silent"])
def test_the_check_can_fail(tmp_path, fault):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")

    class Panic(BaseException):
        pass

    def opener(path, recover):
        if fault == "error":
            raise KeyError("somewhere inside")
        if fault == "panic":
            raise Panic("as Rust's")
        if fault == "unnamed":
            raise EventFormatError("byte 3: bad")
        if fault == "silent" and not recover:
            raise EventFormatError(f"{path}: byte 3: bad")
        return _Broken(path, fault)

    assert check.outcome(path, opener)[0] == "FAILURE"
    assert check.outcome(path, lambda path, recover: _Broken(path, "none"))[0] == "events"


_ROWS = st.lists(
    st.tuples(st.integers(0, 2**34), st.integers(0, 239), st.integers(0, 179), st.integers(0, 1)),
    min_size=1,
    max_size=60,
)


@pytest.mark.parametrize("form", WRITERS, ids=lambda form: form.name)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=_ROWS,
    origin=st.sampled_from([0, 0, 1, 2**24 - 5, 2**31 - 9, 2**40]),
    scale=st.sampled_from([1, 1 << 12, 1 << 25]),
)
@example(rows=[(0, 0, 0, 0)], origin=0, scale=1)
def test_what_is_written_is_read(tmp_path_factory, form, rows, origin, scale):
    t, x, y, p = np.array(sorted(rows), np.int64).T
    events = Events.from_arrays(origin + t // scale, x, y, p, height=180, width=240)
    path = tmp_path_factory.mktemp("written") / f"a{form.suffixes[0]}"
    try:
        form.write(path, events)
    except ValueError:  # the format cannot hold such times; then there is no file either
        assert not list(path.parent.iterdir())
        assert origin + 2**34 // scale >= 2**24
        return
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    back = read_events(path, height=180, width=240)
    for name in "txyp":
        assert np.array_equal(getattr(back, name), getattr(events, name)), name
    assert (back.height, back.width) == (180, 240)
    with open_events(path, height=180, width=240) as source:
        t0, t1 = int(events.t[len(t) // 3]), int(events.t[-1])
        inside = (events.t >= t0) & (events.t < t1)
        assert np.array_equal(source.by_time(t0, t1).x, events.x[inside])


@pytest.mark.parametrize("magic", MAGIC, ids=lambda magic: repr(magic[:14]))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.binary(max_size=400), suffix=st.sampled_from([form.suffixes[0] for form in FORMATS] + [".unknown"]))
def test_arbitrary_bytes_behind_each_magic(tmp_path_factory, magic, body, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
    path.write_bytes(magic + body)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind, text = check.outcome(path)
    assert kind != "FAILURE", text
