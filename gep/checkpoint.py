"""Resume state of a run: what a run folder holds, and how a run finds its way back into it.

    config.yaml   commit.txt   metrics.jsonl   speed.jsonl
    checkpoints/step_000100/   accelerate's state, meters_<rank>.json, trainer.json, last of all `complete`

A checkpoint without its `complete` marker, or whose files are not those that the marker lists, does not count.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from omegaconf import DictConfig, ListConfig, OmegaConf

from gep import config, distributed, run_lock
from gep.checkpoint_files import CheckpointError, check, find, mark_complete, prune, step_of, write_whole
from gep.mask import masked

# Fields that do not change results: a run may be resumed with other values. Named by the end of the dotted
# name.
MAY_DIFFER = (
    "run",
    "run_dir",
    "num_workers",
    "train.threads",
    "train.resume",
    "train.log_every",
    "train.progress",
    "train.trackers",
    "train.save_every",
    "train.keep_checkpoints",
    "train.compile",
    "train.checkpointing",
)


def prepare_run_dir(
    run_dir: str | os.PathLike[str],
    cfg: Any,
    *,
    may_differ: Sequence[str] = (),
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Path:
    """Make a run folder with config.yaml and commit.txt, or check that an existing one fits the
    configuration. No other process may work there until this one's `fit` or the process itself ends.

    Call it on every rank, after the accelerator exists.

    Args:
        run_dir: the folder; made where missing.
        cfg: the root dataclass; `cfg.train.resume` is honoured where there is one.
        may_differ: further ends of dotted names that do not change results.
        inputs: field -> file that the run starts from (another run's weights). Its path may change, its content may
            not; files that do not exist are passed over.
    Returns:
        run_dir as a Path.
    Raises:
        ValueError: the folder holds a run of another configuration, or any run under resume="never", or another
            process is working there.
        OSError: the folder cannot be made or written.
    """
    run_dir = Path(run_dir)
    run_lock.claim(run_dir)
    problem = None
    if distributed.is_main():
        now = masked(_plain(OmegaConf.create(config.dump(cfg))))
        if has_progress(run_dir):
            problem = _overwrite_problem(run_dir, getattr(getattr(cfg, "train", None), "resume", "auto"))
            path = run_dir / "config.yaml"
            if problem is None and path.is_file():
                problem = difference(masked(_plain(OmegaConf.load(path))), now, path, may_differ)
        digests = {name: _digest(Path(file)) for name, file in (inputs or {}).items() if Path(file).is_file()}
        if problem is None and has_progress(run_dir):
            problem = _input_problem(run_dir / "inputs.json", digests)
        if problem is None:
            write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(now)))
            _note_commit(run_dir / "commit.txt")
            write_whole(run_dir / "inputs.json", json.dumps(digests, indent=2) + "\n")
    problem = distributed.gather_objects(problem)[0]
    if problem is not None:
        run_lock.release(run_dir)
        raise ValueError(problem)
    return run_dir


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _input_problem(path: Path, digests: Mapping[str, str]) -> str | None:
    if not path.is_file():
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in before if name in digests and before[name] != digests[name])
    if not changed:
        return None
    return (
        f"{path.parent} was begun with other weights than those that {', '.join(changed)} names now: going on would "
        "mix the two. Choose another run folder, or move this one away"
    )


def has_progress(run_dir: Path) -> bool:
    """True where a run has already written results."""
    metrics = run_dir / "metrics.jsonl"
    return bool(find(run_dir)) or (metrics.is_file() and metrics.stat().st_size > 0)


def refuse_overwrite(run_dir: Path, resume: str) -> None:
    """Raise ValueError if resume is "never" and the folder already holds results."""
    problem = _overwrite_problem(run_dir, resume) if has_progress(run_dir) else None
    problem = distributed.gather_objects(problem)[0]
    if problem is not None:
        raise ValueError(problem)


def _plain(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg))  # a dataclass was written


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], source: Path, may_differ: Sequence[str] = ()
) -> str | None:
    """What to tell a user whose settings would change the results of a run begun with others, or None."""
    before, after = _flat(old), _flat(new)
    free = (*MAY_DIFFER, *may_differ)
    lines = []
    for name in sorted({*before, *after}):
        absent = "(absent)"
        was, now = before.get(name, absent), after.get(name, absent)
        if was != now and not any(f".{name}".endswith(f".{end}") for end in free):
            lines.append(f"  {name}: {was} there, {now} now")
    if not lines:
        return None
    return (
        f"{source} was written by a run with other settings:\n" + "\n".join(lines) + "\n"
        "Choose another run folder for the new settings, or give the old ones to resume; to start over in "
        "this folder, move or delete it first"
    )


def save(
    accelerator: Accelerator,
    run_dir: Path,
    step: int,
    *,
    trainer: dict,
    meters: list,
    keep: int,
    size_hint: int,
) -> Path:
    """Save the whole training state; on every rank.

    Args:
        accelerator: holds the prepared module, optimiser and scaler.
        run_dir: the run's folder.
        step: optimiser steps done.
        trainer: JSON values of the trainer, the same on all ranks.
        meters: JSON values of this rank.
        keep: number of checkpoints to keep; 0 keeps all. Older ones go only after the new one is complete.
        size_hint: bytes a checkpoint is expected to take, for the message about a full disk.
    Raises:
        CheckpointError: it could not be written (on all ranks). The partial one is removed, earlier ones
            stay.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"

    def make_folder() -> None:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def write_state() -> None:
        accelerator.save_state(str(folder))
        (folder / f"meters_{distributed.rank()}.json").write_text(json.dumps(meters))

    def finish() -> None:
        if distributed.is_main():
            (folder / "trainer.json").write_text(json.dumps(trainer, indent=1))
            mark_complete(folder)
            prune(run_dir, step, keep)

    # Ranks meet after each part, so that one rank's full disk does not leave the others waiting.
    for part in (make_folder, write_state, finish):
        failure = None
        try:
            part()
        except Exception as error:  # torch and safetensors wrap a full disk in types of their own
            failure = error
        if distributed.all_agree(failure is not None):
            _fail_together(failure, folder, size_hint)
    return folder


def resume(accelerator: Accelerator, run_dir: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Load the newest checkpoint that can be loaded; on every rank.

    Args:
        accelerator: holds the prepared module, optimiser and scaler, which take up the saved state.
        run_dir: the run's folder.
        settings: what the checkpoint's trainer["settings"] must agree with, but for MAY_DIFFER.
    Returns:
        The trainer's values with this rank's "meters" added, or None where there is no checkpoint.
    Raises:
        CheckpointError: there are checkpoints and none can be loaded.
        ValueError: the run was begun with other settings.
    """
    candidates = distributed.gather_objects(find(run_dir))[0]
    newest = step_of(candidates[0]) if candidates else -1
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if not (folder / "complete").is_file() and step_of(folder) > newest:
            _warn(f"{folder} is incomplete (the run was ended while saving); taking the one before")
    causes = []
    for folder in candidates:
        problem = failure = None
        try:
            check(folder, content=distributed.is_main())
            trainer = json.loads((folder / "trainer.json").read_text())
            problem = difference(trainer["settings"], settings, folder)
        except Exception as error:  # whatever a damaged file makes a reader raise
            failure = error
        if problem is not None:
            raise ValueError(problem)
        # Ranks meet before they load as well: loading shards of a model may wait for the other ranks.
        if not distributed.all_agree(failure is not None):
            try:
                _load(accelerator, folder, trainer)
            except Exception as error:
                failure = error
            if not distributed.all_agree(failure is not None):
                return trainer
        causes.append(_first_line(failure))
        _warn(f"{folder} cannot be loaded ({causes[-1]}); taking the one before")
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {run_dir / 'checkpoints'} can be loaded "
            f"(newest: {causes[0]}); put one back, or move the run folder away to start over"
        )
    return None


def _load(accelerator: Accelerator, folder: Path, trainer: dict[str, Any]) -> None:
    accelerator.load_state(str(folder))
    trainer["meters"] = []
    if trainer["world_size"] == distributed.world_size():
        trainer["meters"] = json.loads((folder / f"meters_{distributed.rank()}.json").read_text())
    else:
        _warn(
            f"{folder} was saved by {trainer['world_size']} processes, this run has "
            f"{distributed.world_size()}: it goes on, but not bit for bit"
        )


def _fail_together(failure: Exception | None, folder: Path, size_hint: int) -> None:
    existing = next(p for p in folder.absolute().parents if p.is_dir())
    free = shutil.disk_usage(existing).free
    cause = next(c for c in distributed.gather_objects(_first_line(failure) if failure else None) if c)
    if free < max(size_hint, 1 << 20):  # torch's own words do not say so
        cause = f"the disk is full ({cause})"
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(existing).free
    raise CheckpointError(
        f"could not save {folder}: {cause}. A checkpoint takes about {size_hint / 1e6:.3g} MB, "
        f"{free / 1e6:.3g} MB are free there. The partial checkpoint was removed, earlier ones and the "
        "metrics are untouched: free space and start the same command again to resume"
    ) from failure


def _overwrite_problem(run_dir: Path, resume: str) -> str | None:
    if resume != "never":
        return None
    return (
        f"{run_dir} already holds a run and train.resume is never; move or delete the folder, choose another "
        "run folder, or set train.resume=auto to go on with it"
    )


def _note_commit(path: Path) -> None:
    """The commit the code is at, "+changes" where the working tree differs; a line whenever that is new."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        line = git("rev-parse", "HEAD") + (" +changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        line = "not a git checkout"
    lines = path.read_text().splitlines() if path.is_file() else []
    if lines and lines[-1] != line:
        _warn(f"the run was begun at commit {lines[-1]}, the code is now at {line}")
    if not lines or lines[-1] != line:
        write_whole(path, "\n".join([*lines, line]) + "\n")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        result |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return result


def _first_line(error: Exception | None) -> str:
    if error is None:
        return "another rank could not"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    # torch lists what does not fit from the second line on.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _warn(message: str) -> None:
    if distributed.is_main():
        print(f"warning: {message}", file=sys.stderr, flush=True)
