"""Event Stream files against bytes by hand, another encoder and decoder, and a real file."""

from __future__ import annotations

import numpy as np
import pytest

from gep.events.io import read_events
from gep.events.types import EventFormatError, Events
from tests.fuzz import handmade
from tests.fuzz.seeds import events as some_events

_DVS = b"Event Stream\x02\x00\x00\x01\x05\x00\x04\x00"  # 5 columns, 4 rows
_ATIS = b"Event Stream\x02\x00\x00\x02\x05\x00\x04\x00"


def _lists(events: Events) -> list[list[int]]:
    return [getattr(events, name).tolist() for name in "txyp"]


def test_dvs_by_hand(tmp_path):
    path = tmp_path / "a.es"
    # Step 3, OFF, (1, 0); a reset; two overflows of 127; step 126, ON, (4, 3).
    path.write_bytes(_DVS + bytes([3 << 1, 1, 0, 0, 0]) + b"\xfe\xff\xff" + bytes([126 << 1 | 1, 4, 0, 3, 0]))
    events = read_events(path)
    assert _lists(events) == [[3, 3 + 254 + 126], [1, 4], [3, 0], [0, 1]]
    assert (events.height, events.width) == (4, 5)


def test_atis_exposures_are_left_out(tmp_path):
    path = tmp_path / "a.es"
    # Step 2, ON; an exposure after step 5; overflows of 63 and of 3 x 63; step 1, OFF.
    body = bytes([2 << 2 | 2, 0, 0, 0, 0]) + bytes([5 << 2 | 1, 1, 0, 1, 0]) + b"\xfd\xff" + bytes([1 << 2, 2, 0, 2, 0])
    path.write_bytes(_ATIS + body)
    assert _lists(read_events(path)) == [[2, 2 + 5 + 4 * 63 + 1], [0, 2], [3, 1], [1, 0]]


def test_a_size_given_replaces_the_headers(tmp_path):
    path = tmp_path / "a.es"
    path.write_bytes(_DVS + bytes([1, 4, 0, 3, 0]))
    assert read_events(path, height=10, width=20).width == 20
    with pytest.raises(EventFormatError, match=r"a\.es: event 0: x = 4 is outside the sensor's 4 columns"):
        read_events(path, height=4, width=4)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"Event Stream", "byte 12: Event Stream version none; only 2.x is read"),
        (b"Event Stream\x01\x02\x00\x01" + bytes(9), "byte 12: Event Stream version 1.2.0"),
        (b"Event Stream\x02\x00\x00\x00" + bytes(9), "byte 15: a generic stream; only DVS and ATIS"),
        (b"Event Stream\x02\x00\x00\x09" + bytes(9), "byte 15: a type 9 stream"),
        (_DVS[:18], "byte 18: the file ends inside its header"),
        (_DVS[:16] + bytes(4), "byte 16: sensor size 0x0"),
        (_DVS, "byte 20: holds no events"),
        (_DVS + b"\xff\xff\xfe", "byte 20: holds no events"),
        (_DVS + bytes([0, 5, 0, 0, 0]), "byte 20: event at x = 5, y = 0 lies outside the 4x5 sensor"),
    ],
)
def test_faults(tmp_path, content, message):
    path = tmp_path / "a.es"
    path.write_bytes(content)
    for recover in (False, True):
        with pytest.raises(EventFormatError, match=rf"a\.es: {message}"):
            read_events(path, recover=recover)


def test_recover_and_partial(tmp_path):
    path = tmp_path / "a.es"
    path.write_bytes(_DVS + bytes([2, 1, 0, 1, 0]) + bytes([2, 1, 0, 4, 0]) + bytes([2, 1, 0, 1, 0]))
    with pytest.raises(EventFormatError, match=r"a\.es: byte 25: event at x = 1, y = 4 .* reads the 1 events"):
        read_events(path)
    with pytest.warns(UserWarning, match=r"byte 25: .* kept the 1 events before it, lost 10 of 35 bytes"):
        assert _lists(read_events(path, recover=True)) == [[1], [1], [2], [0]]
    path.write_bytes(_DVS + bytes([2, 1, 0, 1, 0]) + bytes([2, 1]))
    with pytest.warns(UserWarning, match=r"a\.es: byte 25: dropped a trailing partial event of 2 bytes"):
        assert len(read_events(path)) == 1


def test_against_the_other_library(tmp_path):
    faery = pytest.importorskip("faery")
    made = some_events(300, 30, 40, seed=1, step=400)
    exposures = np.arange(300) % 4 == 1
    for content, kept in (
        (handmade.es(made), np.ones(300, bool)),
        (handmade.es(made, exposures), ~exposures),
    ):
        path = tmp_path / "a.es"
        path.write_bytes(content)
        theirs = np.concatenate(list(faery.events_stream_from_file(path)))
        ours = read_events(path)
        assert _lists(ours) == [theirs[name].tolist() for name in ("t", "x", "y", "on")]
        assert _lists(ours) == [getattr(made, name)[kept].tolist() for name in "txyp"]


def test_real_file(real_data):
    faery = pytest.importorskip("faery")
    path = real_data / "recordings" / "poker.es"
    theirs = np.concatenate(list(faery.events_stream_from_file(path)))
    events = read_events(path)
    assert len(events) == 2628 and (events.height, events.width) == (32, 30)
    assert _lists(events) == [theirs[name].tolist() for name in ("t", "x", "y", "on")]
