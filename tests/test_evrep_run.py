"""Training LLM-EvRep through its own command line, on a tiny N-MNIST of simulated recordings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import downstream.llm_evrep.run as evrep
from downstream.llm_evrep.config import EvRepConfig
from downstream.llm_evrep.model import EvRep
from downstream.llm_evrep.readers import Answers, build_reader
from downstream.llm_evrep.semantic import ScoreSemantic
from downstream.llm_evrep.task import EvRepTask, judge, summarise
from gep import config
from gep.config import ConfigError
from gep.data.build import build
from gep.data.config import DataConfig
from gep.demo.digits import Digits
from gep.demo.recordings import simulate_digits
from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.models.encoder import EventEncoder
from gep.models.teacher import ImageModel

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "downstream" / "llm_evrep"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 recordings of random strokes with their images, and a random classifier of ten words in `reader/`."""
    rng = np.random.default_rng(0)
    images = np.zeros((40, 28, 28), np.uint8)
    for image in images:
        x, y = rng.integers(6, 18, 2)
        image[y : y + rng.integers(4, 10), x : x + rng.integers(2, 8)] = 255
    labels = np.arange(40) % 10
    folder = tmp_path_factory.mktemp("world") / "nmnist"
    simulate_digits(Digits(images, labels, np.arange(40) // 10), folder, split="train", copies=1, seed=0)
    torch.manual_seed(0)
    model = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789"))
    with torch.no_grad():  # random features differ little: centred and enlarged, they say different words
        frames = torch.from_numpy(np.pad(images, ((0, 0), (4, 4), (4, 4))))[:, None].expand(-1, 3, -1, -1)
        model.class_head.weight.mul_(5)
        model.class_head.bias.sub_(model(frames).mean(dim=0))
    model.save(folder.parent / "reader")
    return folder


def arguments(root: Path, run: Path, *more: str) -> list[str]:
    return [
        str(CONFIGS / "nmnist.yaml"),
        *(name for name in more if name.endswith(".yaml")),
        f"run={run}",
        f"data.root={root}",
        "data.holdout=0.2",
        f"llm.name=tagger:{root.parent / 'reader'}",
        "llm.words=2",
        "loss.semantic_warmup=2",
        "train.steps=6",
        "train.batch_size=8",
        "train.log_every=1",
        "train.progress=false",
        *(name for name in more if not name.endswith(".yaml")),
    ]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line]


def count_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the tagger is shown by `describe`, from here on."""
    from downstream.llm_evrep.readers.tagger import Tagger

    describe, shown = Tagger.describe, []

    def counted(self: Tagger, images: Tensor, *args: object, **more: object) -> list[str]:
        shown.append(len(images))
        return describe(self, images, *args, **more)

    monkeypatch.setattr(Tagger, "describe", counted)
    return shown


# ---- the command ------------------------------------------------------------------------------------


def test_it_trains_evaluates_and_exports(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    more = ("train.steps=16", "optim.lr=0.01", "optim.warmup_steps=0", "loss.semantic_warmup=0")
    found = evrep.main(arguments(root, run, *more))
    assert {"eval/sobel_error", "eval/jaccard", "eval/agreement"} <= set(found)
    assert 0 <= found["eval/jaccard"] <= 1 and 0 <= found["eval/agreement"] <= 100
    first, *_, last = lines(run)[:16]
    assert first["loss"] == pytest.approx(first["fidelity"] + 1 - first["jaccard"], rel=1e-5)
    assert last["loss"] < 0.95 * first["loss"]
    # The export draws what was evaluated.
    model = EvRep.from_pretrained(run / "export")
    assert model.reader.startswith("tagger:") and model.metrics["eval/jaccard"] == found["eval/jaccard"]
    data = config.load(EvRepConfig, arguments(root, run)).data
    _, held = build(data, paired=True)
    reader = build_reader(f"tagger:{root.parent / 'reader'}", words=2)
    rows = []
    for index in range(len(held)):
        sample = held.sample(index, None)
        image = model.from_events(sample["events"], sample["t_us"])
        frame = torch.from_numpy(sample["image"])[None]
        rows.append(judge(image, frame, reader.describe(image, ""), reader.describe(frame, "")))
    again = summarise({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
    assert {f"eval/{name}": value for name, value in again.items()} == pytest.approx(
        {name: found[name] for name in found if name.startswith("eval/")}, rel=1e-5
    )
    # A finished run is not trained again, asks nothing about frames, and gives the same numbers.
    shown = count_images(monkeypatch)
    assert evrep.main(arguments(root, run, *more)) == found and not shown
    with pytest.raises(ValueError, match=r"loss\.fidelity"):
        evrep.main(arguments(root, run, *more, "loss.fidelity=0.5"))


def test_the_ablations_run_by_config_alone(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"fidelity_only": (0, 1), "one_one": (1, 1), "one_half": (1, 0.5), "half_one": (0.5, 1)}
    shown = count_images(monkeypatch)
    for name, (semantic, fidelity) in weights.items():
        run = tmp_path / name
        more = (str(CONFIGS / "ablation" / f"{name}.yaml"), f"cache={tmp_path / 'answers'}", "train.steps=1")
        found = evrep.main(arguments(root, run, *more, "loss.semantic_warmup=0"))
        line = lines(run)[0]
        expected = fidelity * line["fidelity"] + (semantic * (1 - line["jaccard"]) if semantic else 0)
        assert line["loss"] == pytest.approx(expected, rel=1e-5) and "eval/jaccard" in found
        assert ("jaccard" in line) == bool(semantic)
        loaded = config.load(EvRepConfig, [str(CONFIGS / "nmnist.yaml"), more[0]])
        assert loaded.run == f"runs/nmnist/llm_evrep_{name}"
    # Each of the 40 frames was described once for all four runs; the generated images of the evaluation were each time.
    held = 40 - len(build(loaded_data(root), paired=True)[0])
    assert sum(shown) == 40 + 4 * held


def loaded_data(root: Path) -> DataConfig:
    return config.load(EvRepConfig, arguments(root, root)).data


def test_without_a_reader_only_fidelity_is_left(root: Path, tmp_path: Path) -> None:
    found = evrep.main(arguments(root, tmp_path / "run", "llm.name=", "loss.estimator=none", "train.steps=1"))
    assert "eval/sobel_error" in found and "eval/jaccard" not in found
    assert EvRep.from_pretrained(tmp_path / "run" / "export").reader == ""
    assert not (tmp_path / "run" / "answers").exists()


def test_it_starts_from_a_gep_encoder(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36))
    source = DataConfig(height=36, width=36, windows=3, window_us=40_000)
    GEPModel.from_parts(encoder, Histogram(log1p=True), source).save_pretrained(tmp_path / "gep")
    more = ("generator.init=gep", f"generator.model={tmp_path / 'gep'}", "generator.freeze_encoder=true")
    with pytest.warns(UserWarning, match=r"represent\.\*"):
        evrep.main(arguments(root, tmp_path / "run", *more, "train.steps=2", "data.windows=2"))
    model = EvRep.from_pretrained(tmp_path / "run" / "export")
    assert isinstance(model.represent, Histogram) and model.input_settings["windows"] == 2
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.generator.encoder.state_dict()[name]), name


@pytest.mark.parametrize(
    "override, error, message",
    [
        ("llm.name=", ValueError, "set llm.name"),
        ("llm.name=gpt", ValueError, "openai:<model>"),
        ("llm.name=tagger:/nowhere/at/all", FileNotFoundError, "/nowhere/at/all"),
        ("loss.fidelity=-1", ConfigError, "loss.fidelity=-1"),
        ("data.pick=1", ConfigError, "data.pick=1"),
        ("data.clip=true", ConfigError, "data.clip"),
        ("eval_samples=-1", ConfigError, "eval_samples"),
        ("generator.init=gep", ConfigError, "generator.model"),
        ("generator.freeze_encoder=true", ConfigError, "generator.init=gep"),
        ("llm.concurrency=0", ConfigError, "llm.concurrency=0"),
        ("generator.preset=huge", ConfigError, "generator.preset"),
    ],
)
def test_mistakes_are_named(root: Path, tmp_path: Path, override: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        evrep.main(arguments(root, tmp_path / "run", override))


def test_a_run_is_not_resumed_with_a_reader_of_other_weights(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evrep.main(arguments(root, run, "train.steps=1"))
    assert (run / "reader.txt").read_text().startswith("tagger:")
    (run / "reader.txt").write_text("tagger:another@0123\n")  # as a Hub id's commit, or a folder's files, may change
    with pytest.raises(ValueError, match=r"begun with the reader 'tagger:another@0123'.*another run folder"):
        evrep.main(arguments(root, run, "train.steps=1"))


# ---- estimator=score --------------------------------------------------------------------------------

SCORE = ("loss.estimator=score", "loss.score_samples=3", "loss.semantic_warmup=0", "train.log_every=1")


def test_score_counts_what_it_shows_and_stops_at_its_budget(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    loss = ScoreSemantic.loss

    def counted(self: ScoreSemantic, *args: object, **more: object) -> dict[str, Tensor]:
        before = self.shown
        found = loss(self, *args, **more)
        asked.append(self.shown - before)
        return found

    monkeypatch.setattr(ScoreSemantic, "loss", counted)
    found = evrep.main(arguments(root, tmp_path / "run", *SCORE, "loss.score_budget=80"))
    assert asked == [24, 24, 24, 0, 0, 0] and found["score_shown"] == 72
    assert ["jaccard" in line for line in lines(tmp_path / "run")[:6]] == [True] * 3 + [False] * 3
    assert "loss.score_budget=80: 72 images were shown to the reader before step 4" in capsys.readouterr().err
    assert EvRep.from_pretrained(tmp_path / "run" / "export").metrics["score_shown"] == 72


def test_score_resumed_equals_uninterrupted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = (*SCORE, "loss.score_budget=100", "loss.semantic_start=1", "train.save_every=2", "train.ema=0.5")
    whole = evrep.main(arguments(root, tmp_path / "whole", *more))
    forward, calls = EvRepTask.forward, []

    def cut(self: EvRepTask, *args: object, **more: object) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of step 2, with a fifth of the budget spent since
            raise KeyboardInterrupt
        return forward(self, *args, **more)

    monkeypatch.setattr(EvRepTask, "forward", cut)
    with pytest.raises(KeyboardInterrupt):
        evrep.main(arguments(root, tmp_path / "cut", *more))
    assert evrep.main(arguments(root, tmp_path / "cut", *more)) == whole
    assert whole["score_shown"] == 96
    for name in ("metrics.jsonl", "export/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_readers_without_weights_are_asked_through_the_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from downstream.llm_evrep.readers.tagger import Tagger

    monkeypatch.setattr(Tagger, "has_weights", False)
    shown = count_images(monkeypatch)
    evrep.main(arguments(root, tmp_path / "run", "loss.score_samples=2", "train.steps=4"))
    # 40 frames, of the held-out ones the generated images too, and four steps of 8 × 2 perturbations.
    assert sum(shown) == 40 + (40 - len(build(loaded_data(root), paired=True)[0])) + 4 * 16
    assert len(Answers(tmp_path / "run" / "answers")) == sum(shown)
    # The same run from the start, as one that was killed before its first checkpoint: nothing is asked again.
    del shown[:]
    evrep.main(
        arguments(
            root, tmp_path / "again", "loss.score_samples=2", "train.steps=4", f"cache={tmp_path / 'run' / 'answers'}"
        )
    )
    assert not shown
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


# ---- processes and kills ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["soft", "score"])
def test_two_processes_give_one_process_its_losses(root: Path, tmp_path: Path, estimator: str) -> None:
    more = (f"loss.estimator={estimator}", "loss.semantic_start=1", "loss.score_budget=100", "train.steps=5")
    evrep.main(arguments(root, tmp_path / "one", *more))
    done = launch(
        *(str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"),
        *("downstream/llm_evrep/run.py", *arguments(root, tmp_path / "two", *more)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    both = [lines(tmp_path / run)[-1] for run in ("one", "two")]
    assert both[1]["eval/sobel_error"] == pytest.approx(both[0]["eval/sobel_error"], rel=1e-3)
    assert sorted(file.name for file in (tmp_path / "two" / "answers").iterdir()) == [
        "answers-0.jsonl",
        "answers-1.jsonl",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["soft", "score"])
def test_killed_and_resumed_equals_uninterrupted(root: Path, tmp_path: Path, estimator: str) -> None:
    more = ("train.steps=12", "train.save_every=2", f"loss.estimator={estimator}", "loss.score_budget=250")
    command = [sys.executable, "downstream/llm_evrep/run.py"]
    done = launch(*command, *arguments(root, tmp_path / "whole", *more))
    assert done.returncode == 0, done.stderr[-2000:]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, *arguments(root, killed, *more)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(metrics.read_text().splitlines()) < 12, "the run ended before it could be killed"
    done = launch(*command, *arguments(root, killed, *more))
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr[-2000:]
    for name in ("metrics.jsonl", "export/model.safetensors"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
