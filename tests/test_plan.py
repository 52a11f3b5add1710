"""`gep plan`: counts against torch's counter and autograd's own tensors, configs to plans, what fits and what would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gep import cli
from gep.models import backbone as module
from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM
from gep.plan import cost, count, memory, need, towers
from gep.plan.devices import DEVICES, Device, device_of
from gep.plan.measure import PeakBytes, measure
from gep.plan.pace import pace_of
from gep.plan.plan import Setup, plan
from gep.plan.workload import _mean_of_longest, read, stage_of

ROOT = Path(__file__).resolve().parent.parent
NMNIST1, NMNIST2 = (str(ROOT / f"configs/stage{stage}/nmnist.yaml") for stage in (1, 2))
SMALL1, SMALL2 = (str(ROOT / f"configs/stage{stage}/gep_small.yaml") for stage in (1, 2))
NO_CROPS = [f"data.mix.{name}.augment.crop_area_min=1" for name in ("nimagenet", "dsec")]
ENCODERS = {
    "nano": (36, 42),
    "vit_tiny_patch16_224": (48, 32),
    "vit_small_patch14_reg4_dinov2": (42, 56),
    "vit_small_patch16_dinov3": (48, 48),
    "vit_base_patch16_clip_224": (32, 48),
}


def counted(function: Callable[[], Tensor]) -> tuple[int, int]:
    """Operations of the forward and the backward pass, by torch."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = function()
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    return forward, counter.get_total_flops() - forward


def kept(function: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of what autograd keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # noqa: F841 - alive until its tensors are counted
    return sum(found.values())


def per_sample(module: nn.Module, run: Callable[[int], object], mixed: bool) -> float:
    """Bytes kept a sample: what grows with the batch."""

    def of(size: int) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return kept(lambda: run(size), module.parameters())

    return (of(3) - of(1)) / 2


@pytest.mark.parametrize("arch", ENCODERS)
def test_encoder_operations_are_torchs(arch: str) -> None:
    size = ENCODERS[arch]
    encoder = towers.meta_encoder({"arch": arch, "in_chans": 5, "img_size": size, "head_dim": 32, "head_hidden": 24})
    tower = towers.encoder_tower(encoder, *size)
    mine = count.tower_flops(tower).times(3) + count.linear(tower.head_weights, 3)
    found = counted(lambda: encoder.embed(torch.empty(3, 5, *size, device="meta")).sum())
    assert found == (mine.forward, mine.backward)
    encoder.set_grad_checkpointing()
    found = counted(lambda: encoder.embed(torch.empty(3, 5, *size, device="meta")).sum())
    assert sum(found) == mine.total + 3 * count.blocks_again(tower)
    assert tower.parameters == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("arch", ["nano", "vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_sparse_encoder_is_counted_by_what_it_keeps(arch: str) -> None:
    size = ENCODERS[arch]
    keywords = {"arch": arch, "in_chans": 2, "img_size": size, "keep": 0.3}
    encoder = EventEncoder(**keywords)
    tower = towers.encoder_tower(encoder, *size)
    mine = count.tower_flops(towers.kept_tower(tower, 0.3)).times(3)
    assert counted(lambda: encoder(torch.rand(3, 2, *size))[0].sum()) == (mine.forward, mine.backward)
    assert towers.kept_tower(tower, 1.0) == tower
    half = towers.kept_tower(tower, "active")
    assert half.length == tower.length - tower.patches + -(-tower.patches // 2)


@pytest.mark.parametrize("order", ["token", "frame"])
@pytest.mark.parametrize("image", [True, False])
def test_backbone_operations_are_torchs(order: str, image: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(40, width=96, depth=3, heads=4, order=order)
    tower = towers.backbone_tower(backbone, 4 * 6)

    def run() -> Tensor:
        modality = torch.tensor([[0, 1, 0, 1]] * 2)
        output = backbone(torch.randn(2, 4, 6, 40), modality, torch.arange(8).view(2, 4) * 1000, (2, 3))
        return output.next.sum() + (output.image.sum() if image else 0)

    mine = count.backbone_flops(tower, 40, 2, keys=None, next_head=True, image_head=image).times(2)
    assert counted(run) == (mine.forward, mine.backward)
    backbone.set_grad_checkpointing()
    assert sum(counted(run)) == mine.total + 2 * count.blocks_again(tower)
    backbone.set_grad_checkpointing(False)
    if order == "frame":
        monkeypatch.setattr(module, "SLICED", 6)
        mine = count.backbone_flops(tower, 40, 2, keys=(24 + 6) / 2, next_head=True, image_head=image).times(2)
        assert counted(run) == (mine.forward, mine.backward)
    causal = count.attention(24, 96, keys=25 / 2)
    assert causal.forward == sum(2 * 2 * 96 * (query + 1) for query in range(24))


def test_image_models_are_counted_without_weights() -> None:
    tower = towers.teacher_tower("timm:vit_tiny_patch16_224", 32, 32)
    with torch.device("meta"):
        teacher = FrozenVFM.from_spec("timm:vit_tiny_patch16_224", pretrained=False, device="meta")
    forward, _ = counted(lambda: teacher.features(torch.zeros(1, 3, 32, 32))[1].sum())
    assert forward == count.tower_flops(tower).forward
    assert (tower.patches, tower.width, tower.pooled) == (4, 192, 192)

    for name in ("vit_wee_patch16_reg1_gap_256", "vit_small_patch16_18x2_224", "vit_base_patch16_xp_224"):
        tower = towers.teacher_tower(f"timm:{name}", 32, 32)
        with torch.device("meta"):
            teacher = FrozenVFM.from_spec(f"timm:{name}", pretrained=False, device="meta")
        forward, _ = counted(lambda: teacher.features(torch.zeros(1, 3, 32, 32))[1].sum())  # noqa: B023
        assert forward == count.tower_flops(tower).forward
    for name in ("convnext_base", "swin_base_patch4_window7_224"):
        with pytest.raises(ValueError, match="no ViT image tower: choose a ViT-"):
            towers.teacher_tower(f"open_clip:{name}", 224, 224)

    tower = towers.teacher_tower("open_clip:ViT-B-32/openai", 64, 64)
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-32", device="meta", force_image_size=64)
    # In training mode: torch's counter does not see the fused attention of evaluation.
    forward, _ = counted(lambda: clip.visual.train()(torch.zeros(1, 3, 64, 64, device="meta")).detach().sum())
    assert forward == count.tower_flops(tower).forward + 2 * tower.head_weights
    assert (tower.patches, tower.width, tower.pooled) == (4, 768, 512)
    assert tower.parameters == sum(p.numel() for p in clip.parameters())
    assert tower.unused == tower.parameters - sum(p.numel() for p in clip.visual.parameters())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("arch", [arch for arch in ENCODERS if "base" not in arch])
def test_encoder_memory_is_what_autograd_keeps(arch: str, mixed: bool) -> None:
    size = ENCODERS[arch]
    encoder = EventEncoder(arch, in_chans=2, img_size=size)
    found = per_sample(encoder, lambda batch: encoder(torch.randn(batch, 2, *size))[0], mixed)
    mine = memory.tower_bytes(towers.encoder_tower(encoder, *size), mixed=mixed)
    assert mine == pytest.approx(found, rel=0.06)


@pytest.mark.parametrize("mixed", [False, True])
def test_backbone_memory_is_what_autograd_keeps(mixed: bool) -> None:
    backbone = Backbone(48, width=192, depth=3, heads=4, order="frame")

    def run(batch: int) -> object:
        modality = torch.zeros(batch, 4, dtype=torch.int64)
        return backbone(torch.randn(batch, 4, 9, 48), modality, torch.arange(4).expand(batch, 4) * 1000, (3, 3))

    tower = towers.backbone_tower(backbone, 36)
    mine = memory.backbone_bytes(tower, 48, 2, mixed=mixed, heads=0)
    assert mine == pytest.approx(per_sample(backbone, run, mixed), rel=0.04)
    once = kept(lambda: run(1), backbone.parameters()) - per_sample(backbone, run, False)
    assert once == pytest.approx(memory.mask_bytes(tower, mixed=False), rel=0.05)


def test_peak_bytes_forgets_what_is_freed() -> None:
    held = torch.zeros(100)
    with PeakBytes([held, "no tensor"]) as peak:
        view = held[:50]
        for _ in range(3):
            made = view + 1
            del made
    assert peak.largest == 400 + 200


def test_measured_steps_are_predicted() -> None:
    """Both stages, real modules: operations exactly, memory within a tenth; nothing is said of time."""
    rates = Device(
        name="cpu", bf16_tflops=0.1, fp32_tflops=0.05, memory_gib=8, bandwidth_gbs=10, link_gbs=5, source="test"
    )
    checked = "train.checkpointing=true"
    for files in ([NMNIST1, "loss.similarity=1", "data.pick=2"], [NMNIST2, "data.windows=3"], [NMNIST1, checked]):
        found = measure(read([*files, "teacher.name=export:none"]), rates, batch=8, steps=1, events=200)
        assert found.flops == pytest.approx(found.flops_predicted, rel=1e-3)
        assert found.bytes_predicted == pytest.approx(found.bytes, rel=0.2 if checked in files else 0.15)
        assert found.batch == 8 and found.seconds > 0


def test_the_stage_is_told_by_its_fields() -> None:
    assert stage_of([NMNIST1]) == 1 and stage_of([NMNIST2]) == 2
    assert stage_of(["backbone.preset=nano"]) == 2
    with pytest.raises(ValueError, match="--stage 1 or --stage 2"):
        stage_of(["train.steps=3"])
    with pytest.raises(ValueError, match=r"encoder.*stage 1.*backbone.*stage 2"):
        stage_of(["encoder.preset=nano", "backbone.preset=nano"])


def test_workloads_of_the_published_configs() -> None:
    first, second = read([SMALL1], gpus=8), read([SMALL2], gpus=8)
    assert (first.windows, first.images, first.tokens, first.encoder.length) == (1, 1, 256, 261)
    # Of the three sources one gives clips (20 %); a device has one sequence at a time, so nothing is padded.
    assert second.images == pytest.approx(0.8 * 1 + 0.2 * 4)
    assert (second.frames, second.backbone.length, second.attention) == (8, 2048, "causal")
    assert need.events_a_window(first, 1_000.0) == (pytest.approx(0.7 * 30_000 + 0.3 * 1_000), True)
    with pytest.raises(ValueError, match="64 does not divide over 5 devices"):
        read([SMALL1], gpus=5)
    with pytest.raises(ValueError, match="--stage1 FILE"):
        read([SMALL2, "model=elsewhere"])
    other = read([SMALL2, "model=elsewhere", "sequence.events=1"], stage1=[SMALL1])
    assert other.padded and other.attention == "mask" and other.max_frames == 8
    framed = read([SMALL2, "backbone.order=frame"], gpus=8)
    assert (framed.attention, framed.keys(2048)) == ("frames", (2048 + 256) / 2)
    limited = read([SMALL2, "backbone.order=frame", "backbone.span=3"], gpus=8)
    assert (limited.attention, limited.keys(2048)) == ("mask", None)
    # Stage 2 encodes as its stage 1 does.
    sparse = read([SMALL2, "model=elsewhere"], stage1=[SMALL1, "encoder.keep=0.25"])
    assert sparse.encoder.length == 5 + 64 and sparse.tokens == 256 and not sparse.assumed_active
    with pytest.raises(ValueError, match="choose a pair of equal patch"):
        read([SMALL1, "teacher.name=timm:vit_base_patch16_224"])


def test_longest_of_a_batch() -> None:
    draws = [(a, b, c) for a in (1, 1, 4) for b in (1, 1, 4) for c in (1, 1, 4)]
    assert _mean_of_longest({4: 1.0, 1: 2.0}, 3) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_state_is_sharded_and_accumulation_runs_twice() -> None:
    whole = memory.state_bytes(1_000, 500, mixed=False, ema=True)
    assert whole == {"weights": 4e3, "frozen weights": 2e3, "gradients": 4e3, "moments": 8e3, "average": 4e3}
    shared = memory.state_bytes(1_000, 500, mixed=False, ema=False, shards=8, largest_block=10)
    assert shared["moments"] == 1_000 and shared["weights"] == 500 + 80 and shared["frozen weights"] == 2e3
    once, twice = read([SMALL1]), read([SMALL1, "train.accumulate=4"])
    assert all(part.again == 0 for part in cost.parts(once))
    assert cost.parts(twice)[1].again == cost.parts(twice)[1].flops.forward
    held = [need.device_bytes(work, gpus=1)["activations"] for work in (once, twice)]
    assert held[0] == pytest.approx(4 * held[1])


def test_plan_says_what_would_fit() -> None:
    work = read([SMALL1, "train.batch_size=4096", "train.precision=no"])
    found = plan(work, Setup(device=device_of("rtx4090")))
    options = {option.change.split("=")[0]: option for option in found.options}
    assert not found.fits and options["train.accumulate"].fits and not options["train.precision"].fits
    chosen = int(options["train.accumulate"].change.split("=")[1])
    assert 4096 // chosen <= found.largest_micro_batch < 4096 // (chosen // 2)
    checked = options["train.checkpointing"]
    assert checked.bytes < sum(found.memory.values()) and checked.step_s > found.pace.step_s
    just = work.with_train(batch_size=2 * found.largest_micro_batch)
    fitting = {option.change: option.fits for option in plan(just, Setup(device=device_of("rtx4090"))).options}
    assert fitting["train.checkpointing=true"] and not fitting["teacher.cache=FOLDER"]
    refused = plan(read([SMALL1, "train.batch_size=4096", "encoder.drop_path=0.1"]), Setup(device=device_of("l4")))
    assert any("drop_path" in option.change and not option.fits for option in refused.options)
    base = Setup(device=DEVICES["h200"], gpus=8)
    assert plan(read([SMALL1], gpus=8), base).fits


def test_pace_by_mfu_is_plain_arithmetic() -> None:
    work, device = read([SMALL1, "train.precision=bf16"], gpus=8), DEVICES["h200"]
    found = pace_of(work, device, gpus=8, mfu=0.4)
    operations = 8 * sum(part.flops.total for part in cost.parts(work))
    assert found.products_s == pytest.approx(operations / (0.4 * 989e12))
    assert found.samples_per_s == pytest.approx(64 / found.step_s)
    assert found.hours == pytest.approx(240_000 * found.step_s / 3600)
    assert pace_of(work, device, gpus=8, scale=2).step_s == pytest.approx(2 * pace_of(work, device, gpus=8).step_s)


def test_tokens_from_disk_are_counted_in_time_memory_and_storage() -> None:
    device = DEVICES["h200"]
    for live, stored in (
        (read([SMALL1]), read([SMALL1, "teacher.cache=c", *NO_CROPS])),
        (read([SMALL2]), read([SMALL2, "tokens=t"])),
    ):
        assert stored.cached and not live.cached
        assert pace_of(stored, device).step_s < pace_of(live, device).step_s
        held = [need.device_bytes(work, gpus=1) for work in (live, stored)]
        assert held[0]["frozen weights"] > 4e6 and "frozen weights" not in held[1]
        assert need.disk_bytes(live) == need.disk_bytes(stored)
        assert all(part.frozen == 0 for part in cost.parts(stored))
    wide = read([SMALL1, "teacher.cache=c", "teacher.cache_dtype=fp32", *NO_CROPS])
    assert need.token_bytes(wide) == 4 * (256 + 1) * 384 == 2 * need.token_bytes(read([SMALL1]))
    assert need.sample_bytes(wide, 10) == {"events": 130.0, "tokens": 4 * 257 * 384}
    assert need.token_bytes(stored) == 2 * 256 * 384 * (4 + stored.images)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    argv = [SMALL1, "train.batch_size=128", "--gpus", "8", "--device", "h100", "train.steps=10", "--json", str(out)]
    cli.main(["plan", *argv])
    printed = capsys.readouterr().out
    assert "Stage 1 on 8 x h100" in printed and "10 steps x 128 samples (16 a device)" in printed
    stored = json.loads(out.read_text())
    assert stored["samples"] == 1280 and stored["fits"] and stored["device"]["name"] == "h100"
    assert stored["parts"][0]["flops"]["backward"] > stored["parts"][0]["flops"]["forward"]
    assert stored["memory_bytes"] == sum(stored["memory"].values())
    for wrong in ([SMALL1, "--device", "h9"], [SMALL1, "--device", "h100", "--batch", "3"], ["--device", "h100"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["plan", *wrong])
        assert stopped.value.code == 2
