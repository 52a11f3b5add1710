"""Checkpointing, compilation and attention without a mask: each gives what the plain blocks give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gep import accelerator as accelerator_module
from gep.accelerator import cpu_bf16, precision_of, set_checkpointing
from gep.engine import TrainConfig, fit, make_accelerator
from gep.models import backbone as module
from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder
from gep.models.layers import Sight, attend
from gep.optim import OptimConfig, make_optimizer, param_groups

GRID, FRAMES, DIM = (2, 3), 4, 10


def encoder(**keywords: object) -> EventEncoder:
    torch.manual_seed(0)
    return EventEncoder("nano", 2, (36, 36), **keywords).train()


def backbone(order: str = "frame") -> Backbone:
    torch.manual_seed(0)
    return Backbone(DIM, width=24, depth=3, heads=2, order=order).train()


def images(batch: int = 3) -> Tensor:
    return torch.poisson(torch.full((batch, 2, 36, 36), 0.3), generator=torch.Generator().manual_seed(1))


def sequences(batch: int = 2, *, padded: bool = False) -> tuple[tuple[object, ...], dict[str, object]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, FRAMES, 6, DIM, generator=generator)
    t_us = torch.randint(30_000, 70_000, (batch, FRAMES), generator=generator).cumsum(1)
    valid = torch.ones(batch, FRAMES, dtype=torch.bool)
    valid[0, -1] = False
    return (tokens, torch.zeros_like(t_us), t_us, GRID), {"valid": valid} if padded else {}


def gradients(net: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the gradient of every parameter that has one; stochastic depth draws the same each time."""
    net.zero_grad()
    torch.manual_seed(3)
    loss = run()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def kept_bytes(run: Callable[[], Tensor]) -> int:
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # noqa: F841 - alive until its tensors are counted
    return sum(found.values())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.5, "active"])
def test_a_checkpointed_encoder_has_the_same_gradients(keep: float | str, mixed: bool) -> None:
    net, x = encoder(drop_path=0.5, keep=keep), images()

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return net(x)[0].float().square().mean()

    plain, kept = gradients(net, run), kept_bytes(run)
    assert set_checkpointing(net, True) == 2  # the encoder, and timm's ViT in it
    checked, left = gradients(net, run), kept_bytes(run)
    assert_close(checked, plain, rtol=0, atol=0)
    assert left < 0.7 * kept
    set_checkpointing(net, False)
    assert kept_bytes(run) == kept


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("order", ["frame", "token"])
def test_a_checkpointed_backbone_has_the_same_gradients(order: str, padded: bool, mixed: bool) -> None:
    net = backbone(order)
    given, more = sequences(padded=padded)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return net(*given, **more).next.float().square().mean()

    plain, kept = gradients(net, run), kept_bytes(run)
    assert set_checkpointing(net, True) == 1
    checked, left = gradients(net, run), kept_bytes(run)
    assert_close(checked, plain, rtol=0, atol=0)
    assert left < 0.5 * kept


def test_attention_frame_by_frame_is_the_masked_one() -> None:
    q, k, v = torch.randn(3, 2, 4, 15, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    frame = torch.arange(15) // 5
    mask = (frame <= frame[:, None])[None, None]
    found = []
    for sight in (Sight(mask), Sight(frame=5)):
        y = attend(q, k, v, sight)
        found.append((y, *torch.autograd.grad(y.sin().sum(), (q, k, v))))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("order", ["frame", "token"])
def test_no_mask_is_made_where_none_is_needed(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = backbone(order)
    given, more = sequences()
    monkeypatch.setattr(module, "SLICED", 1000)
    masked = gradients(net, lambda: net(*given).hidden.square().mean())
    monkeypatch.setattr(module, "SLICED", 1)
    sliced = gradients(net, lambda: net(*given).hidden.square().mean())
    assert_close(sliced, masked)
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as spy:
        net(*given)
    assert len(spy.call_args_list) == net.num_layers * (FRAMES if order == "frame" else 1)
    for call in spy.call_args_list:
        assert call.kwargs.get("attn_mask") is None
        assert bool(call.kwargs.get("is_causal")) == (order == "token")
    padded, more = sequences(padded=True)
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as spy:
        net(*padded, **more)
    assert all(call.kwargs["attn_mask"] is not None for call in spy.call_args_list)


@contextlib.contextmanager
def counted_graphs() -> object:
    """A backend that counts the graphs it is given."""
    torch._dynamo.reset()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        graphs.append(graph)
        return graph.forward

    yield graphs, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_encoder_is_one_graph_for_all_batch_sizes(keep: float, checkpointing: bool) -> None:
    net = encoder(keep=keep)
    net.set_grad_checkpointing(checkpointing)
    with counted_graphs() as (graphs, backend):
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        for batch in (4, 3, 5, 7):
            assert_close(compiled(images(batch))[0], net(images(batch))[0], atol=1e-5, rtol=1e-4)
        assert len(graphs) == 2  # of the first size, then of any


@pytest.mark.parametrize("sliced", [1, 1000])
@pytest.mark.parametrize("order", ["frame", "token"])
def test_the_backbone_is_one_graph_for_all_batch_sizes(
    order: str, sliced: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICED", sliced)
    net = backbone(order)
    with counted_graphs() as (graphs, backend):
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        for batch in (4, 3, 5, 7):
            given, _ = sequences(batch)
            assert_close(compiled(*given).next, net(*given).next, atol=1e-5, rtol=1e-4)
        assert len(graphs) == 2


class Small(nn.Module):
    """An encoder under a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(drop_path=0.5)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.encoder(batch["x"])[0].square().mean()}


def test_train_checkpointing_changes_no_number(tmp_path: Path) -> None:
    train, optim = TrainConfig(steps=3, batch_size=3, log_every=1, save_every=0, progress=False), OptimConfig(lr=1e-3)

    def run(folder: str, task: nn.Module, train: TrainConfig) -> float:
        def batches(step: int) -> object:
            while True:
                yield [{"x": images()}]

        accelerator = make_accelerator(train, tmp_path)
        last = fit(task, batches, train=train, optim=optim, accelerator=accelerator, run_dir=tmp_path / folder)
        return last["loss"]

    plain, checked = Small(), Small()
    losses = run("plain", plain, train), run("checked", checked, replace(train, checkpointing=True))
    assert losses[0] == losses[1]
    assert_close(checked.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert not checked.encoder.vit.grad_checkpointing  # as it was before

    class Bare(nn.Linear):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": super().forward(batch["x"].flatten(1)).mean()}

    with pytest.warns(UserWarning, match="train.checkpointing=true has no effect: Bare has no blocks"):
        run("bare", Bare(2592, 1), replace(train, checkpointing=True))


@pytest.mark.parametrize("flags, want", [("fma avx512_bf16", "bf16"), ("amx_tile amx_bf16", "bf16"), ("avx512f", "no")])
def test_auto_is_bf16_where_the_processor_has_it(
    flags: str, want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags\t\t: fpu {flags} sse\n")
    monkeypatch.setattr(accelerator_module, "_CPU_INFO", info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision_of("auto") == want and cpu_bf16() == [flag for flag in flags.split() if flag.endswith("_bf16")]
    assert make_accelerator(TrainConfig(precision="auto"), tmp_path).mixed_precision == want
    assert [precision_of(name) for name in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]
    info.unlink()
    assert precision_of("auto") == "no"


def test_adamws_fused_kernel_takes_the_same_steps() -> None:
    cfg, found = OptimConfig(lr=1e-2, weight_decay=0.1), []
    for fused in (True, False):
        net = encoder()
        groups = param_groups(net, lr=cfg.lr, weight_decay=cfg.weight_decay)
        optimizer = make_optimizer(groups, cfg)
        assert optimizer.defaults["fused"]
        if not fused:
            plain = [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups]
            optimizer = torch.optim.AdamW(plain, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, foreach=True)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        found.append(net.state_dict())
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
