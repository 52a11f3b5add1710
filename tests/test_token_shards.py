"""Packed tokens: the losses of tokens on the fly, whole shards or none, and nothing read that was made otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stage2_autoregress.pack as pack
import stage2_autoregress.run as stage2
from gep.data.build import build
from gep.data.config import DataConfig
from gep.data.sequence import SequenceConfig, Sequences, collate_sequences
from gep.data.token_samples import TokenSamples, TokenSequences, collate_tokens
from gep.data.token_store import TokenStore
from gep.demo.digits import Digits
from gep.demo.recordings import simulate_digits
from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM, ImageModel
from stage2_autoregress.tokens import FrozenTokens, PackedTokens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nmnist` with 40 recordings, and untrained exports `teacher`, `model`, `other` and `sparse`."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    images = np.zeros((40, 28, 28), np.uint8)
    for image in images:
        x, y = rng.integers(6, 18, 2)
        image[y : y + rng.integers(4, 10), x : x + rng.integers(2, 8)] = 255
    simulate_digits(
        Digits(images, np.arange(40) % 10, np.arange(40) // 10), folder / "nmnist", split="train", copies=1, seed=0
    )
    torch.manual_seed(0)
    ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789")).save(folder / "teacher")
    for name, keep in (("model", 1.0), ("other", 1.0), ("sparse", 0.5)):
        encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36), keep=keep)
        GEPModel.from_parts(encoder, Histogram(), DataConfig()).save_pretrained(folder / name)
    return folder


def arguments(world: Path, *more: str, model: str = "model") -> list[str]:
    return [
        str(ROOT / "configs/stage2/nmnist.yaml"),
        *(f"model={world / model}", f"teacher.name=export:{world / 'teacher'}", f"data.root={world / 'nmnist'}"),
        *("data.holdout=0.2", "train.batch_size=8", "train.progress=false", *more),
    ]


def small_run(folder: Path, *more: str) -> list[str]:
    return [f"run={folder}", "train.steps=3", "train.log_every=1", "optim.warmup_steps=1", *more]


def losses(run: Path) -> list[float]:
    """Every training loss, and everything that evaluation said."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [v for line in lines for k, v in sorted(line.items()) if k.startswith("eval/") or k in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def packed(world: Path) -> Path:
    """fp32 tokens in shards of at most 1 MB."""
    return pack.main(arguments(world, f"pack={world / 'fp32'}", "pack_dtype=fp32", "shard_mb=1"))


def test_same_losses_as_on_the_fly(world: Path, packed: Path, tmp_path: Path) -> None:
    rounded = pack.main(arguments(world, f"pack={tmp_path / 'tokens'}"))
    more = ("data.pick=4", "loss.image=0.7")
    runs = {"fly": "", "fp32": str(packed), "bf16": str(rounded)}
    for name, tokens in runs.items():
        stage2.main(arguments(world, *small_run(tmp_path / name, f"tokens={tokens}", *more)))
    fly, fp32, bf16 = (losses(tmp_path / name) for name in runs)
    assert len(fly) > 10
    assert fp32 == pytest.approx(fly, rel=1e-6, abs=1e-7)
    # A bf16 has 8 bits: 0.4 % of a token at most, and the errors of many tokens cancel in a mean.
    assert bf16 == pytest.approx(fly, rel=4e-3) and bf16 != fly
    assert GEPModel.from_pretrained(tmp_path / "bf16" / "export").backbone is not None
    # A finished run is known again; with tokens on the fly it would be another run.
    with pytest.raises(ValueError, match="tokens: "):
        stage2.main(arguments(world, *small_run(tmp_path / "bf16", *more)))


def test_a_mix_gives_its_own_losses_too(world: Path, tmp_path: Path) -> None:
    """Two sources with statistics of their own, one of which evaluation reads."""
    one = f"name: nmnist, root: {world / 'nmnist'}, holdout: 0.2"
    common = [
        *(f"model={world / 'model'}", f"teacher.name=export:{world / 'teacher'}", "backbone.preset=nano"),
        *("train.batch_size=8", "train.progress=false", f"data.mix.bright={{{one}, represent: {{scale: 2.0}}}}"),
        f"data.mix.plain={{{one}, weight: 2, window_us: 30000}}",
    ]
    tokens = pack.main([*common, f"pack={tmp_path / 'tokens'}", "pack_dtype=fp32"])
    assert len(TokenStore(tokens).plan.parts) == 3
    for name, given in (("fly", ""), ("packed", tokens)):
        stage2.main([*common, *small_run(tmp_path / name, f"tokens={given}")])
    fly, packed = losses(tmp_path / "fly"), losses(tmp_path / "packed")
    assert packed == pytest.approx(fly, rel=1e-6, abs=1e-7)
    # Which weights the sources have is the run's own; how their frames are made is not.
    argv = [*common, *small_run(tmp_path / "other", f"tokens={tokens}")]
    stage2.main([*argv, "data.mix.plain.weight=5"])
    with pytest.raises(
        ValueError, match=r'data\.mix\.bright\.represent: \{"scale": 2\.0\} there, \{"scale": 3\.0\} now'
    ):
        stage2.main([*argv, "data.mix.bright.represent.scale=3"])


def test_shards_hold_the_encoders_tokens(world: Path, packed: Path) -> None:
    """Read by safetensors itself, and compared with the models themselves."""
    train, _ = build(DataConfig(root=str(world / "nmnist"), holdout=0.2), paired=True)
    model = GEPModel.from_pretrained(world / "model")
    teacher = FrozenVFM.from_spec(f"export:{world / 'teacher'}")
    shards = [load_file(path) for path in sorted(packed.glob("train-*.safetensors"))]
    assert len(shards) > 2 and sum(len(shard["tokens"]) for shard in shards) == len(train)
    tokens = torch.cat([shard["tokens"] for shard in shards])
    assert tokens.dtype == torch.float32
    for index in (0, len(train) - 1):
        sample = train.sample(index, None)
        batch = collate_sequences([Sequences(train, SequenceConfig()).sample(index, None)])
        events = model.encoder(Histogram()(batch["events"]))[0]
        image = teacher.features(torch.from_numpy(sample["image"])[None])[0]
        expected = torch.cat([events, image])
        spread = (expected.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(tokens[index], (expected - expected.mean(-1, keepdim=True)) / spread, atol=2e-5)
        assert torch.cat([shard["t_us"] for shard in shards])[index].tolist() == sample["t_us"].tolist()
    samples = TokenSamples(TokenStore(packed), 0)
    assert [samples.sample(i, None)["key"] for i in range(len(train))] == list(train.listing.keys)


def test_half_the_bytes_of_fp32(world: Path, packed: Path, tmp_path: Path) -> None:
    folder = pack.main(arguments(world, f"pack={tmp_path / 'tokens'}"))
    sizes = [sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (folder, packed)]
    frames = 40 * 7 * 36 * 96
    assert 2 * frames <= sizes[0] < 2.02 * frames and sizes[1] > 1.98 * sizes[0]


@pytest.mark.parametrize(
    "more, model, message",
    [
        (["data.window_us=40000"], "model", r"data\.window_us: 50000 there, 40000 now"),
        ([], "other", r"model: [0-9a-f]{16} there, [0-9a-f]{16} now"),
        (["data.holdout=0.4"], "model", r"list eval nmnist: [0-9a-f]{12} there, [0-9a-f]{12} now"),
        (["teacher.image_size=48"], "model", r"teacher: export [0-9a-f]{16} there, export [0-9a-f]{16} now"),
    ],
)
def test_tokens_of_something_else_are_refused(
    world: Path, packed: Path, tmp_path: Path, more: list[str], model: str, message: str
) -> None:
    argv = arguments(world, *small_run(tmp_path / "run", f"tokens={packed}"), *more, model=model)
    with pytest.raises(ValueError, match=message):
        stage2.main(argv)
    if "teacher" not in message:  # whose tokens would not fit the events' grid
        with pytest.raises(ValueError, match=message):
            pack.main(arguments(world, f"pack={packed}", "pack_dtype=fp32", "shard_mb=1", *more, model=model))


def test_the_teacher_is_built_where_it_looks_at_images_alone(
    world: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(FrozenVFM, "from_spec", never)
    stage2.main(arguments(world, *small_run(tmp_path / "run", f"tokens={packed}")))
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    weights = (world / "teacher" / "model.safetensors").read_bytes()
    assert set(inputs) == {"model", "teacher.name", "tokens"}
    assert inputs["teacher.name"] == hashlib.sha256(weights).hexdigest()
    # On events alone no teacher is even named.
    alone = ("sequence.image_last=0", "sequence.events=1", "loss.image=0", "teacher.name=")
    tokens = pack.main(arguments(world, f"pack={tmp_path / 'tokens'}", *alone))
    for name, given in (("fly", ""), ("packed", tokens)):
        found = stage2.main(arguments(world, *small_run(tmp_path / name, f"tokens={given}"), *alone))
        assert found["eval/loss"] > 0 and "eval/predicted_image_r1" not in found
    with pytest.raises(AssertionError, match="built"):
        stage2.main(arguments(world, *small_run(tmp_path / "images")))


def test_another_teachers_tokens_are_refused_without_building_it(world: Path, packed: Path, tmp_path: Path) -> None:
    ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789")).save(tmp_path / "teacher")
    argv = arguments(world, *small_run(tmp_path / "run", f"tokens={packed}"))
    with pytest.raises(ValueError, match=r"teacher: export [0-9a-f]{16} there, export [0-9a-f]{16} now"):
        stage2.main([*argv, f"teacher.name=export:{tmp_path / 'teacher'}"])
    with pytest.raises(ValueError, match=r"teacher: export [0-9a-f]{16} there, timm:vit_x [0-9a-f]{16} now"):
        stage2.main([*argv, "teacher.name=timm:vit_x"])


def test_tokens_stand_without_the_data_set(world: Path, packed: Path, tmp_path: Path) -> None:
    argv = [arg for arg in arguments(world, *small_run(tmp_path / "run", f"tokens={packed}")) if "data.root" not in arg]
    assert stage2.main(argv)["eval/loss"] > 0
    with pytest.warns(UserWarning, match=r"no effect on packed.*flip_x=0\.5, data\.jitter_us=100"):
        argv = arguments(world, *small_run(tmp_path / "two", f"tokens={packed}"), "data.augment.flip_x=0.5")
        stage2.main([*argv, "data.jitter_us=100"])


FATAL = """
import os, sys, signal, stage2_autoregress.pack as pack
write, done = pack.write_shard, []
def fatal(folder, plan, shard, tensors, keys):
    if len(done) == 2:
        (folder / f".{shard.name}.tmp").write_bytes(b"half")
        end()
    done.append(write(folder, plan, shard, tensors, keys))
"""


def raised() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("way", ["interrupted", pytest.param("killed", marks=pytest.mark.slow)])
def test_ended_and_resumed_equals_uninterrupted(
    world: Path, packed: Path, tmp_path: Path, monkeypatch, way: str
) -> None:
    folder = tmp_path / "tokens"
    more = (f"pack={folder}", "pack_dtype=fp32", "shard_mb=1")
    if way == "killed":
        kill = "end = lambda: os.kill(os.getpid(), signal.SIGKILL)\npack.write_shard = fatal\npack.main(sys.argv[1:])\n"
        command = [sys.executable, "-c", FATAL + kill, *arguments(world, *more)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-1000:]
    else:
        names: dict = {"end": raised}
        exec(FATAL, names)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pack, "write_shard", names["fatal"])
            pack.main(arguments(world, *more))
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(kept) == 2
    with pytest.raises(FileNotFoundError, match="was begun: run the same command again"):
        TokenStore(folder)
    pack.main(arguments(world, *more))
    files = {path.name: path for path in folder.glob("*.safetensors")}
    assert all(files[name].stat().st_mtime_ns == time for name, time in kept.items())
    assert {name: path.read_bytes() for name, path in files.items()} == {
        path.name: path.read_bytes() for path in packed.glob("*.safetensors")
    }
    assert not list(folder.glob(".*.tmp"))
    # A complete folder is left alone.
    monkeypatch.setattr(pack, "write_shard", None)
    pack.main(arguments(world, *more))


def test_damage_is_named(packed: Path, tmp_path: Path) -> None:
    for fault in ("missing", "bytes"):
        folder = tmp_path / fault
        shutil.copytree(packed, folder)
        path = sorted(folder.glob("train-*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:-5]) if fault == "bytes" else path.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=f"{path.name}: .*{fault}.*the index says"):
            TokenStore(folder)
    (tmp_path / "bytes" / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json: not valid JSON"):
        TokenStore(tmp_path / "bytes")
    with pytest.raises(FileNotFoundError, match="tokens= "):
        TokenStore(tmp_path / "nowhere")


def test_a_small_disk_is_refused_before_anything_is_written(world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1_900_000))
    with pytest.raises(ValueError, match=r"tokens: the tokens take 0\.00194 GB and 0\.0019 GB are free"):
        pack.main(arguments(world, f"pack={tmp_path / 'tokens'}"))
    assert "40 samples, 280 frames of 36 tokens × 96 in bf16: 0.00194 GB" in capsys.readouterr().out
    assert not (tmp_path / "tokens").exists()


def test_a_sparse_encoders_real_tokens_are_kept(world: Path, tmp_path: Path) -> None:
    folder = pack.main(arguments(world, f"pack={tmp_path / 'tokens'}", "pack_dtype=fp32", model="sparse"))
    train, _ = build(DataConfig(root=str(world / "nmnist"), holdout=0.2), paired=True)
    config = SequenceConfig(interleave=2)
    store = TokenStore(folder)
    theirs = Sequences(train, config), TokenSequences(TokenSamples(store, 0), config)
    batches = [make([source.sample(i, None) for i in range(5)])
               for source, make in zip(theirs, (collate_sequences, collate_tokens))]  # fmt: skip
    model = GEPModel.from_pretrained(world / "sparse")
    fly = FrozenTokens(model.encoder, FrozenVFM.from_spec(f"export:{world / 'teacher'}"), Histogram())
    expected, found = fly(batches[0]), PackedTokens(store.plan.grid)(batches[1])
    assert 0.3 < expected.real.float().mean() < 0.9
    assert torch.equal(expected.real, found.real) and torch.equal(fly.real(batches[0]), found.real)
    assert torch.allclose(expected.frames, found.frames, atol=1e-5) and found.frames.dtype == torch.float32
    assert torch.allclose(expected.image, found.image, atol=1e-5) and expected.grid == found.grid
    assert expected.padded == found.padded and torch.equal(expected.t_us, found.t_us)


@pytest.mark.slow
def test_two_processes_write_the_same_shards(world: Path, packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    more = (f"pack={tmp_path / 'tokens'}", "pack_dtype=fp32", "shard_mb=1", "train.num_workers=1")
    done = subprocess.run([*command, "stage2_autoregress/tokens.py", *arguments(world, *more)], cwd=ROOT, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "complete; train with tokens=" in done.stdout
    for one, two in zip(
        *(sorted(folder.glob("*.safetensors")) for folder in (packed, tmp_path / "tokens")), strict=True
    ):
        first, second = load_file(one), load_file(two)
        assert one.name == two.name and all(torch.allclose(first[k], second[k], atol=1e-5) for k in first)
