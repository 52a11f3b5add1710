"""The optimiser: its settings, the learning rate as a function of the step, parameter groups, averaged weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """peak learning rate"""
    weight_decay: float = 0.05
    """decoupled weight decay of matrices; vectors (bias, norm, tokens) get none"""
    beta1: float = 0.9
    """decay of the gradient's running mean"""
    beta2: float = 0.999
    """decay of the squared gradient's running mean"""
    eps: float = 1e-8
    """added to the denominator"""
    warmup_steps: int = 0
    """steps of linear warm-up from 0 to lr"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """shape of the learning rate after the warm-up"""
    min_lr_ratio: float = 0.0
    """final learning rate as a share of lr, in [0, 1]"""
    clip_norm: float = 1.0
    """largest global gradient norm; 0 = no clipping"""
    layer_decay: float = 1.0
    """learning rate factor per layer from the top down; 1 = off"""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; give a learning rate > 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}; give a share in [0, 1]")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; give a factor in (0, 1], 1 = off")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a value in [0, 1)")
        for name in ("weight_decay", "eps", "warmup_steps", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a value >= 0")


def lr_at(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """Learning rate of one optimiser step.

    Args:
        step: the step about to be taken, 0 ... total_steps - 1.
        total_steps: length of the run.
        cfg: schedule, warm-up and peak.
    Returns:
        Step s of the warm-up has lr * (s + 1) / warmup_steps; after it the rate falls from lr towards
        lr * min_lr_ratio, which it would reach at step total_steps.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps))
    share = 1 - progress if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * share)


def param_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Group a module's trainable parameters by weight decay and learning-rate factor.

    Parameters of one dimension or less, and those named by any (sub)module's `no_weight_decay()` (names
    relative to that module), get no decay. A (sub)module that offers `layer_id(name)` and `num_layers` takes
    part in layer decay: its parameter of layer i has the factor layer_decay ** (num_layers + 1 - i), so that
    layer 0 (the embedding) learns slowest and num_layers + 1 (what follows the last block) at full rate.

    Args:
        module: its parameters with requires_grad are grouped.
        lr: peak learning rate.
        weight_decay: decay of the decaying groups.
        layer_decay: factor per layer in (0, 1].
        scales: learning-rate factor by name prefix ("encoder" covers encoder.*); the longest match wins.
    Returns:
        Groups of {"params", "lr", "weight_decay", "lr_scale", "names"}; lr is already scaled. Each parameter
        is in exactly one.
    Raises:
        ValueError: nothing is trainable, or a prefix in scales matches no parameter.
    """
    scales = dict(scales or {})
    undecayed = _undecayed_names(module)
    layered = _layered_modules(module) if layer_decay != 1.0 else []
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    used: set[str] = set()
    for name, parameter in module.named_parameters():
        prefix = max((p for p in scales if _under(name, p)), key=len, default=None)
        used |= {p for p in scales if _under(name, p)}
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in undecayed else weight_decay
        scale = 1.0 if prefix is None else float(scales[prefix])
        owner = next(((path, sub) for path, sub in layered if _under(name, path)), None)
        if owner is not None:
            path, sub = owner
            layer = sub.layer_id(name[len(path) + 1 :] if path else name)
            scale *= layer_decay ** (sub.num_layers + 1 - layer)
        group = groups.setdefault(
            (decay, scale),
            {"params": [], "lr": lr * scale, "weight_decay": decay, "lr_scale": scale, "names": []},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError(f"{type(module).__name__} has no trainable parameter; set requires_grad on some")
    if unused := sorted(set(scales) - used):
        parts = sorted({name.split(".")[0] for name, _ in module.named_parameters()})
        raise ValueError(f"learning-rate scales name no parameter: {unused}; the parts are {parts}")
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    expected = {id(p) for p in module.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == expected, "a parameter is not in exactly one group"
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over parameter groups; the fused kernel where every parameter's device has one.

    The fused kernel also skips a step on the device itself, without asking the host (see gep.guards).
    """
    kept = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    devices = {p.device.type for group in kept for p in group["params"]}
    floating = all(p.is_floating_point() for group in kept for p in group["params"])
    fused = floating and devices <= {"cpu", "cuda", "xpu"}
    return torch.optim.AdamW(
        kept, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay, fused=fused
    )


class Average:
    """Exponential moving average of a module's trainable parameters, beside them.

    Its decay after step s is min(decay, s / (s + 9)), so that the initial weights do not weigh on a short run.

    Args:
        module: its parameters with requires_grad are averaged.
        decay: share of the old average kept each step, in [0, 1); 0 = there is no average, and nothing happens.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [p.detach() for p in module.parameters() if decay and p.requires_grad]
        self.values = [p.clone() for p in self.parameters]

    def update(self, step: int) -> None:
        """Take in the weights after `step` optimiser steps (1, 2, …)."""
        if self.values:
            torch._foreach_lerp_(self.values, self.parameters, 1 - min(self.decay, step / (step + 9)))

    def swap(self) -> None:
        """Exchange the module's weights and their average, bit for bit."""
        for parameter, value in zip(self.parameters, self.values):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved average."""
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)


def _under(name: str, prefix: str) -> bool:
    return prefix == "" or name == prefix or name.startswith(prefix + ".")


def _undecayed_names(module: nn.Module) -> set[str]:
    names = set()
    for path, sub in module.named_modules():
        if callable(own := getattr(sub, "no_weight_decay", None)):
            names |= {f"{path}.{name}" if path else name for name in own()}
    return names


class _Layered(Protocol):
    num_layers: int

    def layer_id(self, name: str) -> int: ...


def _layered_modules(module: nn.Module) -> list[tuple[str, _Layered]]:
    """Outermost modules that number their layers, e.g. the event encoder."""
    found: list[tuple[str, _Layered]] = []
    for path, sub in module.named_modules():
        offers = callable(getattr(sub, "layer_id", None)) and hasattr(sub, "num_layers")
        if offers and not any(_under(path, outer) for outer, _ in found):
            found.append((path, cast(_Layered, sub)))
    return found
