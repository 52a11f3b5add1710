"""Killing a job again and again, and comparing what comes of it with the same job left alone."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gep import checkpoint
from gep.checkpoint_files import check
from tests.faults import forks, jobs

_IN_A_ROW = 3  # kills of one folder at most
# Seconds, bytes of such a file, checksums of those, and the code's commit, which may move on meanwhile.
_DIFFER = ("speed.jsonl", "trainer.json", "complete", "commit.txt")


@dataclass
class Tally:
    """What became of a scenario."""

    name: str
    kills: int = 0
    resumed: int = 0
    """Kills after which the same command went on."""
    equal: int = 0
    """Kills after which everything came out bit-equal."""
    faults: list[str] = field(default_factory=list)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but temporary ones and those that differ between equal runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _DIFFER and not _is_temporary(path.relative_to(folder))
    }


def _is_temporary(path: Path) -> bool:
    return any(part.startswith(".") or part.endswith((".tmp", ".partial")) for part in path.parts)


def damage(folder: Path, whole: dict[str, bytes], saved: int) -> list[str]:
    """What a kill broke: files under their own names must be whole, logs a beginning, checkpoints sound."""
    faults = []
    for run in folder.glob("run"):
        found = checkpoint.find(run)
        newest = int(found[0].name[5:]) if found else 0
        if newest < saved:
            faults.append(f"the newest checkpoint is of step {newest}, there was one of {saved}")
        for one in found:
            try:
                check(one)
            except (OSError, ValueError) as error:
                faults.append(f"{one.name} is called complete: {error}")
    for name, content in contents(folder).items():
        if "checkpoints/" in name or (name.startswith("out/") and "made" in whole):
            continue  # checked above; another export may be there, see `_export`
        if name not in whole and Path(name).match("out/shard-*.json"):  # a finished shard's, until the index is made
            json.loads(content)
            continue
        expected = whole.get(name)
        is_log = name.endswith("metrics.jsonl") and expected is not None and expected.startswith(content)
        if content != expected and not is_log:
            faults.append(f"{name} has {len(content)} bytes, expected {'no file' if expected is None else 'others'}")
    return faults + _export(folder)


def _export(folder: Path) -> list[str]:
    """An export that was there once loads at any time, as one of the two."""
    if not (folder / "made").exists():
        return []
    names = {"README.md", "config.json", "model.safetensors"}
    there = {path.name for path in (folder / "out").glob("*")}
    return [] if there == names else [f"the export holds {sorted(there)}"]


def torment(scenario: jobs.Scenario, kills: int, world: Path, folder: Path, seed: int) -> Tally:
    """Kills a scenario's job so many times; every third time at least, it is left to end and compared."""
    rng, tally = random.Random(f"{seed} {scenario.name}"), Tally(scenario.name)
    job, log = partial(scenario.job, world), folder / "log"
    (folder / "whole").mkdir(parents=True)
    status, changes, seconds = forks.count(job, folder / "whole", log, scenario.within)
    whole = contents(folder / "whole")
    if status != 0 or changes == 0:
        tally.faults.append(f"undisturbed: exit status {status}, {changes} changes\n{log.read_text()[-2000:]}")
        return tally
    place, row, idle = folder / "killed", 0, 0
    while tally.kills < kills or row:
        place.mkdir(exist_ok=True)
        wanted = tally.kills < kills and row < _IN_A_ROW
        kill = _moment(scenario, changes, seconds, rng) if wanted else None
        saved = max((int(one.name[5:]) for one in checkpoint.find(place / "run")), default=0)
        log.unlink(missing_ok=True)
        try:
            status, _ = forks.run(job, place, log, kill)
        except TimeoutError as error:
            tally.faults.append(f"after kill {tally.kills}: hangs: {error}")
            return tally
        if kill is not None and status == -9:
            tally.kills, row, idle = tally.kills + 1, row + 1, 0
            if faults := damage(place, whole, saved):
                tally.faults += [f"kill {tally.kills} ({kill}): {fault}" for fault in faults]
            continue
        # Left alone, or at its end before the moment came.
        idle += 1
        if kill is not None and scenario.timed:  # the machine has become faster than in the undisturbed run
            seconds = min(seconds, kill.delay_s)
        found = contents(place)
        if status == 0:
            tally.resumed += row
            differing = sorted(name for name in {*whole, *found} if whole.get(name) != found.get(name))
            tally.equal += 0 if differing else row
            if differing:
                tally.faults.append(f"after kill {tally.kills}: {', '.join(differing[:5])} differ")
        else:
            tally.faults.append(f"after kill {tally.kills}: exit status {status}\n{log.read_text()[-2000:]}")
        shutil.rmtree(place)
        row = 0
        if idle > 20:
            tally.faults.append("20 runs in a row ended before their kill")
            break
    return tally


def _moment(scenario: jobs.Scenario, changes: int, seconds: float, rng: random.Random) -> forks.Kill:
    if scenario.timed:
        return forks.Kill(delay_s=rng.uniform(0.2, 1.0) * seconds)
    # Half of them in the middle of what follows the change, which may be written by C++ or Rust.
    delay = rng.choice((0.0, rng.uniform(1e-4, 5e-3)))
    return forks.Kill(change=rng.randint(1, changes), within=scenario.within, delay_s=delay)
