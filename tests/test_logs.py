"""JSONL files, running means, progress, tracker names."""

import builtins
import errno
import json
import math

import pytest
import torch

from gep import logs
from gep.logs import Clock, JsonlWriter, Meters, Progress, check_trackers, shown


def test_jsonl_is_cut_back_and_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1, "loss": torch.tensor(0.5), "bad": math.nan})
    kept = writer.offset
    writer.write({"step": 2})
    assert writer.offset == path.stat().st_size
    resumed = JsonlWriter(path, keep=kept)
    resumed.write({"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5, "bad": None},
        {"step": 3},
    ]
    path.write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 0 bytes"):
        JsonlWriter(path, keep=kept)


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1})

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:4])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logs, "open", lambda *a: FullDisk(builtins.open(*a)), raising=False)
        with pytest.raises(OSError, match=r"metrics\.jsonl.*No space left") as caught:
            writer.write({"step": 2})
    assert caught.value.errno == errno.ENOSPC
    writer.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_meters_average_what_was_seen_and_survive_json():
    meters = Meters()
    values = [0.1, 0.7, 1e-9, 3.3]
    for value in values:
        meters.add({"loss": torch.tensor(value, dtype=torch.float64), "n": 2.0})
    meters.add({"loss": torch.tensor(1.0)})  # another set of names
    copy = Meters()
    copy.load_state_dict(json.loads(json.dumps(meters.state_dict())))
    for some in (meters, copy):
        some.add({"loss": torch.tensor([0.25]), "n": torch.tensor(8)})
    exact = [float(torch.tensor(v).float()) for v in (*values, 0.25)]
    means = meters.means_and_reset()
    assert means == copy.means_and_reset()
    assert math.isclose(means["loss"], (sum(exact) + 1.0) / 6, rel_tol=1e-15)
    assert means["n"] == (4 * 2 + 8) / 5
    assert meters.means_and_reset() == {}
    with pytest.raises(ValueError, match=r"'tokens' has shape \(2,\)"):
        meters.add({"tokens": torch.zeros(2)})


def test_progress_off_a_terminal_is_ten_lines(capsys):
    with Progress(30, start=3) as progress:
        for step in range(3, 30):
            if step == 10:
                progress.note(loss=0.12345, samples_per_s=1234.5)
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/30" for n in range(6, 31, 3)]
    assert "loss 0.1235, 1234 samples/s" in lines[-1] and lines[-1].startswith("step 30/30 (100%)")
    with Progress(10, enabled=False) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""


def test_small_values_are_not_shown_as_zero():
    given = {"lr": 2.34567e-5, "loss": 0.123456, "r1": 93.75123, "off": 0.0, "neg": -3e-9, "nan": math.nan}
    found = shown(given)
    assert str(found.pop("nan")) == "nan"
    assert found == {"lr": 2.35e-5, "loss": 0.1235, "r1": 93.7512, "off": 0.0, "neg": -3e-9}


def test_clock_counts_waiting_and_leaves_out_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    clock = Clock()
    for _ in range(2):
        with clock.waiting():
            now[0] += 1
        now[0] += 3
    with clock.pausing():
        now[0] += 100
    assert clock.lap(2, 16) == {"step": 2, "samples_per_s": 4.0, "data_wait": 0.25, "seconds": 108.0}


def test_unknown_and_missing_trackers_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown tracker 'wand'; there are tensorboard, trackio, wandb"):
        check_trackers(["wand"])
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not installed; pip install wandb .*gep\[trackers\]"):
        check_trackers(["wandb"])
