"""The teacher's tokens on disk: equal losses with and without, crops and flips by hand, ranks, kills, refusals.

One file: every test trains or reads by the same small cache.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import stage1_align.run as stage1
from gep import config
from gep.data import token_cache_fill
from gep.data.bad import BadSample
from gep.data.config import DataConfig, MixedConfig
from gep.data.listing import Listing
from gep.data.mix import Mixed
from gep.data.paired import Recordings, collate
from gep.data.token_cache import check_cacheable
from gep.data.token_cache_fill import attach
from gep.data.token_cache_write import Teacher
from gep.demo.digits import Digits
from gep.demo.recordings import simulate_digits
from gep.events.augment import AugmentConfig
from gep.events.represent import Histogram
from gep.events.types import Events
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM, ImageModel
from gep.models.teacher_cache import fingerprint
from stage1_align.cache import crop_tokens
from stage1_align.task import AlignLossConfig, Stage1Config, Stage1Task

ROOT = Path(__file__).resolve().parent.parent
CROP = AugmentConfig(grid_crop=(24, 18), grid_px=6)


class Source:
    """400 events of a 34 × 34 sensor, seeded by the sample."""

    def __init__(self, index: int):
        rng = np.random.default_rng(index)
        self.events = Events.from_arrays(
            np.sort(rng.integers(0, 1000, 400)), rng.integers(0, 34, 400), rng.integers(0, 34, 400),
            rng.integers(0, 2, 400), height=34, width=34,
        )  # fmt: skip

    def read(self) -> Events:
        return self.events


class Pictures:
    """Random pictures that count how often they are decoded; number `broken` cannot be."""

    def __init__(self, broken: int = -1, seed: int = 0):
        self.decoded, self.broken, self.seed = 0, broken, seed

    def __call__(self, index: int) -> np.ndarray:
        self.decoded += 1
        if index == self.broken:
            raise ValueError("cut short")
        return np.random.default_rng([self.seed, index]).integers(0, 255, (3, 34, 34)).astype(np.uint8)


def recordings(count: int = 7, augment: AugmentConfig | None = None, pictures: Pictures | None = None) -> Recordings:
    keys = tuple(f"s{index}" for index in range(count))
    listing = Listing(
        "toy", "train", keys, (), np.arange(count) % 10, tuple("0123456789"),
        image=pictures or Pictures(), recording=Source,
    )  # fmt: skip
    data = DataConfig(height=36, width=36, windows=2, window_us=500, augment=augment or AugmentConfig())
    return Recordings(listing, data, paired=True, crops=True)


@pytest.fixture(scope="module")
def vfm(tmp_path_factory: pytest.TempPathFactory) -> FrozenVFM:
    torch.manual_seed(0)
    model = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789"))
    return FrozenVFM.from_spec(f"export:{model.save(tmp_path_factory.mktemp('teacher') / 'export')}")


def teacher_of(vfm: FrozenVFM) -> Teacher:
    return Teacher(vfm.features, fingerprint(vfm), vfm.grid(36, 36), vfm.embed_dim, vfm.pooled_dim)


def cached(folder: Path, vfm: FrozenVFM, source: Recordings, **options: object) -> Recordings:
    options = {"dtype": "fp32", "batch_size": 4, "part_bytes": 30_000, "say": lambda _: None, **options}
    attach({"training": (source, True)}, folder, teacher_of(vfm), **options)
    return source


def drawn(source: Recordings, count: int = 7) -> list[dict]:
    return [source.sample(index, np.random.default_rng([5, index])) for index in range(count)]


AUGMENTS = {
    "plain": AugmentConfig(),
    "drops": AugmentConfig(max_event_drop=0.5, area_drop=0.5, flip_polarity=0.5, reverse_time=0.5, max_noise=0.2),
    "crop": CROP,
    "flips and crop": dataclasses.replace(CROP, flip_x=0.5, flip_y=0.5),
}


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_same_losses_with_and_without(tmp_path: Path, vfm: FrozenVFM, name: str, dtype: str) -> None:
    plain, source = recordings(augment=AUGMENTS[name]), recordings(augment=AUGMENTS[name])
    cached(tmp_path, vfm, source, dtype=dtype)
    torch.manual_seed(1)
    encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36), head_dim=96)
    task = Stage1Task(encoder, vfm, Histogram(), AlignLossConfig(similarity=0.5, normalise_target=False))
    with torch.no_grad():
        with_images, with_tokens = collate(drawn(plain)), collate(drawn(source))
        assert "image" in with_images and "image" not in with_tokens
        expected, found = task(with_images), task(with_tokens)
        rows = [task.features(collate([s.sample(i, None) for i in range(7)])) for s in (plain, source)]
    tolerance = {"rel": 1e-6, "abs": 1e-6} if dtype == "fp32" else {"rel": 4e-3, "abs": 2e-3}
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value.item(), **tolerance), term
    for term in rows[0]:
        assert rows[1][term].float().numpy() == pytest.approx(rows[0][term].float().numpy(), **tolerance), term
    if dtype == "bf16":  # what is compared is not the same bits twice
        assert found["regression"].item() != expected["regression"].item()


def test_a_crop_takes_the_same_patches_of_events_and_tokens(tmp_path: Path) -> None:
    """A teacher that answers with its patch's mean grey, and pictures that are the events' own counts."""

    class Counts(Pictures):
        def __call__(self, index: int) -> np.ndarray:
            image = np.zeros((34, 34), np.uint8)
            events = Source(index).events
            np.add.at(image, (events.y, events.x), 1)
            return np.repeat(image[None], 3, axis=0)

    def sums(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = torch.nn.functional.avg_pool2d(images[:, :1].float(), 6) * 36
        return patches.flatten(1)[..., None], images.float().mean((2, 3))

    augment = dataclasses.replace(CROP, flip_x=0.5)
    source = recordings(40, augment, Counts())
    teacher = Teacher(sums, {"name": "sums"}, (6, 6), 1, 3)
    attach({"training": (source, True)}, tmp_path, teacher, dtype="fp32", say=lambda _: None)
    begins, corners = set(), set()
    for sample in drawn(source, 40):
        counts = np.zeros((24, 18))
        for window in sample["events"]:
            assert (window.height, window.width) == (24, 18)
            np.add.at(counts, (window.y, window.x), 1)
        own = counts.reshape(4, 6, 3, 6).sum((1, 3)).ravel()
        assert np.array_equal(sample["teacher_tokens"][:, 0].numpy(), own) and own.sum() > 0
        begins.add(tuple(own))
    assert len(begins) == 40
    # All corners that fit are drawn: 3 rows and 4 columns of patches; evaluation sees the whole.
    for sample in drawn(recordings(200, CROP), 200):
        corners.add(tuple(sample["crop_at"].tolist()))
    assert corners == {(row, column) for row in range(3) for column in range(4)}
    assert source.sample(0, None)["teacher_tokens"].shape == (36, 1)


def test_crop_tokens_by_hand() -> None:
    tokens = torch.arange(24.0).reshape(2, 12, 1)  # 3 rows × 4 columns
    found = crop_tokens(tokens, (3, 4), torch.tensor([[0, 1], [1, 2]]), (2, 2))
    assert found[..., 0].tolist() == [[1, 2, 5, 6], [18, 19, 22, 23]]


def test_pictures_are_asked_for_once(tmp_path: Path, vfm: FrozenVFM) -> None:
    pictures = Pictures()
    source = cached(tmp_path, vfm, recordings(pictures=pictures))
    (folder,) = tmp_path.iterdir()
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 5 and json.loads((folder / "meta.json").read_text())["list"] == source.listing.hash
    before = pictures.decoded
    drawn(pickle.loads(pickle.dumps(source)))
    drawn(source)
    assert pictures.decoded == before  # no picture is decoded in training
    cached(tmp_path, vfm, recordings())
    assert files == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert source.subset([1], "one").tokens is None


def test_what_the_content_depends_on_tells_caches_apart(tmp_path: Path, vfm: FrozenVFM) -> None:
    torch.manual_seed(3)
    other = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789"))
    other = FrozenVFM.from_spec(f"export:{other.save(tmp_path / 'other')}")
    folder = tmp_path / "cache"
    cached(folder, vfm, recordings())
    cached(folder, other, recordings())
    cached(folder, vfm, recordings(), dtype="bf16")
    cached(folder, vfm, recordings(6))
    cached(folder, vfm, recordings(pictures=Pictures(seed=9)))
    cached(folder, vfm, recordings(augment=AugmentConfig(flip_x=0.5)))
    assert len(list(folder.iterdir())) == 6
    cached(folder, vfm, recordings(augment=AUGMENTS["drops"]))  # events alone
    assert len(list(folder.iterdir())) == 6


def test_unfinished_parts_are_made_again_and_full_ones_kept(tmp_path: Path, vfm: FrozenVFM) -> None:
    whole = cached(tmp_path, vfm, recordings())
    (folder,) = tmp_path.iterdir()
    parts = sorted(folder.glob("part_*"))
    expected = [part.read_bytes() for part in parts]
    parts[1].unlink()
    parts[2].write_bytes(expected[2][:-4])
    old, young = folder / "part_00001.bin.elsewhere-1.tmp", folder / "part_00002.bin.elsewhere-2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    kept = parts[0].stat().st_mtime_ns
    cached(tmp_path, vfm, recordings())
    assert [part.read_bytes() for part in parts] == expected and parts[0].stat().st_mtime_ns == kept
    assert not old.exists() and young.exists()  # the young one may be another run's
    assert torch.equal(whole.sample(6, None)["teacher_tokens"], drawn(whole)[6]["teacher_tokens"])


def test_size_is_announced_and_a_full_disk_refused(
    tmp_path: Path, vfm: FrozenVFM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    usage = type("Usage", (), {"free": 50_000})
    monkeypatch.setattr(token_cache_fill.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needs 99,456 bytes, 50,000 bytes are free.*cache_dtype=bf16"):
        cached(tmp_path / "a", vfm, recordings(), say=lines.append)
    assert not (tmp_path / "a").exists()
    # 7 pictures × (36 tokens × 96 + 96) × 4 bytes
    assert "7 pictures × 1 flips × (36 × 96 + 96) fp32 = 99,456 bytes" in lines[0]
    cached(tmp_path / "a", vfm, recordings(), say=lines.append, dtype="bf16")
    assert "49,728 bytes to be written" in lines[1] and any("7 of 7 pictures" in line for line in lines[2:])


def test_unreadable_picture_is_a_bad_sample(tmp_path: Path, vfm: FrozenVFM) -> None:
    with pytest.warns(UserWarning, match="1 cannot be read, the first: sample s3: cut short"):
        source = cached(tmp_path, vfm, recordings(augment=AugmentConfig(flip_x=0.5), pictures=Pictures(broken=3)))
    with pytest.raises(BadSample, match="sample s3: its picture could not be read when"):
        source.sample(3, None)
    assert torch.isfinite(source.sample(4, None)["teacher_tokens"]).all()


def test_a_failing_teacher_leaves_nothing_behind(tmp_path: Path, vfm: FrozenVFM) -> None:
    teacher = dataclasses.replace(teacher_of(vfm), features=lambda x: tuple(y * torch.nan for y in vfm.features(x)))
    with pytest.raises(ValueError, match="the teacher's tokens of s0 are not finite"):
        attach({"training": (recordings(), True)}, tmp_path, teacher, say=lambda _: None)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["meta.json"]


@pytest.mark.parametrize(
    "augment, words",
    [
        ({"max_rotation_deg": 5.0}, r"data\.augment\.max_rotation_deg=5\.0 .*max_rotation_deg=0\.0"),
        ({"max_scale": 0.1}, r"data\.augment\.max_scale=0\.1"),
        ({"max_shift_px": 3}, r"data\.augment\.max_shift_px=3 .*grid_crop"),
        ({"crop_area_min": 0.5}, r"data\.augment\.crop_area_min=0\.5"),
        ({"crop_aspect_max": 1.5}, r"data\.augment\.crop_aspect_max=1\.5"),
    ],
)
def test_what_moves_pixels_off_the_grid_is_refused(augment: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_cacheable(DataConfig(augment=AugmentConfig(**augment)))
    entry = MixedConfig(name="nmnist", augment=AugmentConfig(**augment))
    with pytest.raises(ValueError, match=words.replace("data", "data.mix.one", 1)):
        check_cacheable(DataConfig(mix={"one": entry}))


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"data\.name=images films"):
        check_cacheable(DataConfig(name="images"))
    with pytest.raises(ValueError, match=r"data\.clip=true"):
        check_cacheable(DataConfig(name="dsec", clip=True))
    with pytest.raises(ValueError, match=r"max_scale=0\.2"):
        config.load(Stage1Config, ["teacher.cache=somewhere", "data.augment.max_scale=0.2"])
    with pytest.raises(ValueError, match=r"multiples of grid_px = 14"):
        AugmentConfig(grid_crop=(28, 20))
    with pytest.raises(ValueError, match=r"grid_crop=\[42, 42\] is larger"):
        DataConfig(augment=AugmentConfig(grid_crop=(42, 42)))
    with pytest.raises(ValueError, match=r"data\.mix\.\*\.augment\.grid_crop"):
        DataConfig(mix={"a": MixedConfig(augment=CROP), "b": MixedConfig()})
    source = recordings()
    with pytest.raises(ValueError, match="is stage 1's"):
        Recordings(source.listing, dataclasses.replace(source.config, augment=CROP), paired=True)


def test_a_mix_reads_each_source_from_its_own_cache(tmp_path: Path, vfm: FrozenVFM) -> None:
    parts = {"a": recordings(), "b": recordings(5, pictures=Pictures(seed=2))}
    attach({n: (s, True) for n, s in parts.items()}, tmp_path, teacher_of(vfm), dtype="fp32", say=lambda _: None)
    mixed = Mixed(parts, {"a": 1.0, "b": 1.0})
    batch = collate([mixed.sample(index, None) for index in (8, 2)])
    images = torch.from_numpy(np.stack([parts["b"].picture(1), parts["a"].picture(2)]))
    assert torch.allclose(batch["teacher_tokens"], vfm.features(images)[0], atol=1e-6)


# ---- through the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, vfm: FrozenVFM) -> Path:
    images = np.zeros((40, 28, 28), np.uint8)
    for number, image in enumerate(images):
        image[6 + number % 7 : 20, 8 : 10 + number % 9] = 255
    folder = tmp_path_factory.mktemp("world") / "nmnist"
    simulate_digits(Digits(images, np.arange(40) % 10, np.arange(40) // 10), folder, split="train", copies=1, seed=0)
    return folder


def arguments(root: Path, vfm: FrozenVFM, run: Path, *more: str) -> list[str]:
    return [
        str(ROOT / "configs" / "stage1" / "nmnist.yaml"), f"run={run}", f"data.root={root}", "data.holdout=0.2",
        f"teacher.name={vfm.spec}", "train.steps=4", "train.batch_size=8", "train.log_every=1", *more,
    ]  # fmt: skip


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_a_cache_equals_one_without(root: Path, vfm: FrozenVFM, tmp_path: Path) -> None:
    crop = ("data.augment.grid_crop=[24,24]", "data.augment.grid_px=6", "data.augment.flip_x=0.5")
    stage1.main(arguments(root, vfm, tmp_path / "without", *crop))
    more = (*crop, f"teacher.cache={tmp_path / 'cache'}", "teacher.cache_dtype=fp32")
    stage1.main(arguments(root, vfm, tmp_path / "with", *more))
    for one, two in zip(lines_of(tmp_path / "without"), lines_of(tmp_path / "with"), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # training and evaluation
    with pytest.raises(ValueError, match="set it to 6"):
        stage1.main(arguments(root, vfm, tmp_path / "patch", "data.augment.grid_crop=[28,28]"))


@pytest.mark.slow
def test_two_ranks_share_the_work(root: Path, vfm: FrozenVFM, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    stage1.main(arguments(root, vfm, one, f"teacher.cache={tmp_path / 'cache1'}"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    more = (f"teacher.cache={tmp_path / 'cache2'}",)
    done = subprocess.run(
        [*command, "stage1_align/run.py", *arguments(root, vfm, two, *more)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [[line["loss"] for line in lines_of(run) if "loss" in line] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    files = [sorted(p.relative_to(c) for p in c.rglob("*.bin")) for c in (tmp_path / "cache1", tmp_path / "cache2")]
    assert files[0] == files[1] and len(files[0]) == 2


def worker(rank: int, ranks: int, folder: Path, pause: float, vfm: FrozenVFM, results: Any) -> None:
    """One rank of a run that makes a cache and reads it."""
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    asked = []

    def features(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(images))
        time.sleep(pause)
        return vfm.features(images)

    source, teacher = recordings(), dataclasses.replace(teacher_of(vfm), features=features)
    attach({"training": (source, True)}, folder / "cache", teacher, dtype="fp32", batch_size=1, part_bytes=20_000)
    results.put((sum(asked), collate(drawn(source))["teacher_tokens"].numpy()))


def test_killed_and_finished_by_two_ranks(vfm: FrozenVFM, tmp_path: Path) -> None:
    """Every picture is asked for once, but for the one that was under way; all ranks read the same."""
    fork = multiprocessing.get_context("fork")  # nothing is imported again: seconds on a busy machine
    results = fork.Queue()
    first = fork.Process(target=worker, args=(0, 1, tmp_path, 0.3, vfm, results))
    first.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(tmp_path.rglob("*.bin"))) < 2:
        time.sleep(0.01)
    first.kill()
    first.join()
    left = 7 - len(list(tmp_path.rglob("*.bin")))
    assert 0 < left <= 5
    ranks = [fork.Process(target=worker, args=(rank, 2, tmp_path, 0.0, vfm, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(60)
    asked = [count for count, _ in found]
    assert sum(asked) == left and max(asked) - min(asked) <= 1
    expected = vfm.features(torch.from_numpy(np.stack([recordings().picture(index) for index in range(7)])))[0]
    for _, tokens in found:
        assert np.allclose(tokens, expected.numpy(), atol=1e-5)
