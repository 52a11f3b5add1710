"""Learning rate against hand values; parameter groups against names."""

import math

import pytest
import torch
from torch import nn

from gep.optim import OptimConfig, lr_at, make_optimizer, param_groups


def test_lr_cosine_by_hand():
    cfg = OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1)
    assert [lr_at(s, 12, cfg) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert lr_at(4, 12, cfg) == 2.0
    assert math.isclose(lr_at(8, 12, cfg), 2.0 * (0.1 + 0.9 * 0.5))  # half-way
    assert math.isclose(lr_at(6, 12, cfg), 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))))  # a quarter
    assert math.isclose(lr_at(12, 12, cfg), 0.2)
    assert math.isclose(lr_at(99, 12, cfg), 0.2)


def test_lr_linear_and_constant_by_hand():
    linear = OptimConfig(lr=1.0, schedule="linear")
    assert [lr_at(s, 4, linear) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    constant = OptimConfig(lr=3.0, schedule="constant", warmup_steps=2)
    assert [lr_at(s, 4, constant) for s in range(4)] == [1.5, 3.0, 3.0, 3.0]
    assert lr_at(5, 5, OptimConfig(lr=1.0, warmup_steps=5)) == 1.0  # a run that is all warm-up


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("min_lr_ratio", 1.5),
        ("layer_decay", 0.0),
        ("beta1", 1.0),
        ("warmup_steps", -1),
        ("clip_norm", -1.0),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        OptimConfig(**{field: value})


class Encoder(nn.Module):
    num_layers = 2

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))
        self.patch = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.norm = nn.LayerNorm(3)

    def no_weight_decay(self):
        return {"pos_embed"}

    def layer_id(self, name):
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 3 if name.startswith("norm") else 0


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(3, 2)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def by_name(groups):
    return {name: group for group in groups for name in group["names"]}


def test_decay_layer_decay_and_scales():
    groups = by_name(param_groups(Task(), lr=1.0, weight_decay=0.1, layer_decay=0.5, scales={"head": 10.0}))
    expected = {  # name: (weight decay, factor)
        "encoder.pos_embed": (0.0, 0.125),
        "encoder.patch.weight": (0.1, 0.125),
        "encoder.patch.bias": (0.0, 0.125),
        "encoder.blocks.0.weight": (0.1, 0.25),
        "encoder.blocks.1.weight": (0.1, 0.5),
        "encoder.blocks.1.bias": (0.0, 0.5),
        "encoder.norm.weight": (0.0, 1.0),
        "head.weight": (0.1, 10.0),
        "head.bias": (0.0, 10.0),
        "temperature": (0.0, 1.0),
    }
    for name, (decay, factor) in expected.items():
        group = groups[name]
        assert (group["weight_decay"], group["lr_scale"], group["lr"]) == (decay, factor, factor), name
    assert set(groups) == {n for n, p in Task().named_parameters() if p.requires_grad}


def test_scales_multiply_layer_decay_and_longest_prefix_wins():
    scales = {"encoder": 0.1, "encoder.norm": 2.0}
    groups = by_name(param_groups(Task(), lr=3.0, weight_decay=0.1, layer_decay=0.5, scales=scales))
    assert math.isclose(groups["encoder.blocks.1.weight"]["lr"], 3.0 * 0.1 * 0.5)
    assert groups["encoder.norm.bias"]["lr_scale"] == 2.0
    assert groups["head.weight"]["lr_scale"] == 1.0


def test_every_parameter_once_tied_ones_too():
    task = Task()
    task.tied = task.head.weight
    groups = param_groups(task, lr=1.0, weight_decay=0.1)
    params = [id(p) for g in groups for p in g["params"]]
    assert len(params) == len(set(params)) == sum(p.requires_grad for p in task.parameters())
    assert len(groups) == 2


def test_wrong_scales_and_nothing_to_train_are_refused():
    with pytest.raises(ValueError, match=r"\['haed'\].*'encoder', 'frozen', 'head', 'temperature'"):
        param_groups(Task(), lr=1.0, weight_decay=0.1, scales={"haed": 1.0})
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(1, 1).requires_grad_(False), lr=1.0, weight_decay=0.1)


def test_fused_optimizer_takes_the_reference_step_and_skips_on_found_inf():
    torch.manual_seed(0)
    cfg = OptimConfig(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    layer, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(layer.state_dict())
    optimizer = make_optimizer(param_groups(layer, lr=cfg.lr, weight_decay=cfg.weight_decay), cfg)
    assert optimizer.defaults["fused"]
    plain = torch.optim.AdamW(
        [
            {"params": [reference.weight], "weight_decay": 0.1},
            {"params": [reference.bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    for _ in range(3):
        x = torch.randn(5, 3)
        for module, optim in ((layer, optimizer), (reference, plain)):
            optim.zero_grad()
            module(x).square().sum().backward()
            optim.step()
    torch.testing.assert_close(layer.weight, reference.weight)
    torch.testing.assert_close(layer.bias, reference.bias)

    before = [p.clone() for p in layer.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, optimizer.state.values()))
    assert all(s["step"] == 3 for s in optimizer.state.values())
    optimizer.found_inf.zero_()
    optimizer.step()
    assert not torch.equal(before[0], layer.weight)
