"""Heads against float64 references, by what they are equivariant to, and by what they can learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from downstream.dense.heads import DPTHead, LinearHead, Standardise, UPerHead, build_head

DEEP = ("upernet", "dpt")


def levels_of(channels, batch: int = 2, grid: tuple[int, int] = (5, 7), seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, dim, *grid, generator=g) for dim in channels]


def test_standardise_is_the_identity_until_fitted_and_then_numpys():
    standardise = Standardise((3, 2))
    batches = [levels_of((3, 2), batch=size, seed=size) for size in (1, 4, 2)]
    for levels in batches:
        levels[0].mul_(0.01).add_(500)  # a mean that swallows squares in float32
        levels[1][:, 1] = 0.1  # constant: divided by 1
    for given, got in zip(batches[0], standardise(batches[0])):
        assert torch.equal(given, got)
    standardise.fit(iter(batches))
    for i, start in ((0, 0), (1, 3)):
        values = np.concatenate([levels[i].double().numpy() for levels in batches]).swapaxes(0, 1)
        values = values.reshape(len(values), -1)
        stop = start + len(values)
        std = values.std(axis=1)
        if i:
            assert std[1] < 1e-9
            std[1] = 1
        np.testing.assert_allclose(standardise.mean[start:stop].numpy(), values.mean(axis=1), rtol=1e-6)
        np.testing.assert_allclose(standardise.std[start:stop].numpy(), std, rtol=1e-5)
    got = torch.cat([torch.cat(standardise(levels), dim=1).transpose(0, 1).flatten(1) for levels in batches], dim=1)
    assert got.mean(dim=1).abs().max() < 2e-2 and (got.std(dim=1, correction=0)[:4] - 1).abs().max() < 2e-2
    assert got[4].abs().max() < 1e-6 and set(standardise.state_dict()) == {"mean", "std"}
    with pytest.raises(ValueError, match="no batch"):
        standardise.fit([])


def test_the_linear_head_is_one_matrix_at_every_position():
    head = build_head("linear", (3, 4), 5)
    head.standardise.fit([levels_of((3, 4), seed=9)])
    levels = levels_of((3, 4))
    x = np.concatenate([level.double().numpy() for level in levels], axis=1)
    mean, std = (v.double().numpy()[None, :, None, None] for v in (head.standardise.mean, head.standardise.std))
    weight, bias = head.predict.weight.detach().double().numpy()[..., 0, 0], head.predict.bias.detach().numpy()
    want = np.einsum("oc,bchw->bohw", weight, (x - mean) / std) + bias[None, :, None, None]
    np.testing.assert_allclose(head(levels).detach().numpy(), want, atol=1e-5)
    assert isinstance(head, LinearHead) and sum(p.numel() for p in head.parameters()) == 5 * 7 + 5


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("num", [1, 2, 4, 6])
@pytest.mark.parametrize("grid", [(6, 6), (1, 1), (5, 7), (1, 3)])
def test_any_number_of_levels_and_any_map(name, num, grid):
    torch.manual_seed(0)
    head = build_head(name, (96,) * num, 3, width=32).train()
    levels = levels_of((96,) * num, batch=1, grid=grid)
    output = head(levels)
    assert output.shape == (1, 3, 4 * grid[0], 4 * grid[1]) and output.isfinite().all()
    assert output.std() > 0


@pytest.mark.parametrize("name", DEEP)
def test_large_maps_and_mixed_channels(name):
    head = build_head(name, (24, 24, 24, 40), 11, width=20)
    assert head(levels_of((24, 24, 24, 40), grid=(32, 46))).shape == (2, 11, 128, 184)


@pytest.mark.parametrize("name", ["linear", *DEEP])
def test_a_sample_means_the_same_alone_and_in_a_batch_also_in_training(name):
    torch.manual_seed(0)
    head = build_head(name, (96,) * 4, 3, width=32).train()
    levels = levels_of((96,) * 4, batch=3)
    together = head(levels)
    for i in range(3):
        assert torch.allclose(together[i : i + 1], head([level[i : i + 1] for level in levels]), atol=1e-5)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in head.modules())


@pytest.mark.parametrize("name", ["linear", *DEEP])
def test_every_level_is_read_and_every_parameter_takes_part(name):
    torch.manual_seed(0)
    head = build_head(name, (32,) * 4, 3, width=32)
    levels = [level.requires_grad_() for level in levels_of((32,) * 4)]
    (head(levels) * torch.randn(3, 1, 1)).square().sum().backward()
    assert all(level.grad.abs().max() > 0 for level in levels)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


@pytest.mark.parametrize("kind", [UPerHead, DPTHead])
def test_the_shallowest_level_becomes_the_finest_scale(kind):
    assert kind((16,) * 4, 2, width=16).taken == [0, 1, 2, 3]
    assert kind((16,) * 12, 2, width=16).taken == [2, 5, 8, 11]
    assert kind((16,) * 1, 2, width=16).taken == [0, 0, 0, 0]
    head, sizes = kind((16,) * 4, 2, width=16), []
    for module in head.scales if kind is UPerHead else head.reassemble:
        module.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[2:])))
    head(levels_of((16,) * 4, grid=(6, 8)))
    assert sizes == [(24, 32), (12, 16), (6, 8), (3, 4)]


@pytest.mark.parametrize("name", DEEP)
def test_what_is_deep_reaches_every_finer_scale_and_not_the_other_way(name):
    torch.manual_seed(0)
    head, given = build_head(name, (16,) * 4, 2, width=16), {}
    # What is read at each scale once the coarser ones have been added to it, from fine to coarse.
    sums = head.smooth if name == "upernet" else head.fusion
    for i, module in enumerate(sums):
        module.register_forward_hook(lambda _m, x, _o, i=i: given.update({i: x[0]}))
    levels = levels_of((16,) * 4, grid=(6, 8))
    head(levels)
    for changed in range(4):
        before = dict(given)
        head([level + (i == changed) * level.flip(2) for i, level in enumerate(levels)])
        for i in range(len(sums)):
            assert torch.equal(given[i], before[i]) == (i > changed), (changed, i)
        head(levels)


@pytest.mark.parametrize("name", DEEP)
def test_a_change_at_a_token_is_seen_most_at_its_own_place(name):
    torch.manual_seed(0)
    head = build_head(name, (32,) * 4, 3, width=32).eval()
    levels = levels_of((32,) * 4, batch=1, grid=(9, 12))
    before = head(levels)
    for row, column in ((1, 2), (7, 9), (2, 10)):
        changed = [level.clone() for level in levels]
        for level in changed:
            level[:, :, row, column] += 1
        energy = F.avg_pool2d((head(changed) - before).square().sum(1, keepdim=True), 4)[0, 0]
        assert divmod(int(energy.argmax()), 12) == (row, column)


@pytest.mark.parametrize("name", DEEP)
def test_detail_finer_than_a_token_can_be_learnt(name):
    torch.manual_seed(0)
    levels = levels_of((16,) * 4, batch=4, grid=(4, 4))
    mix = torch.randn(16, 16)  # 16 channels of a token decide its 4 x 4 pixels, mixed
    truth = F.pixel_shuffle(torch.einsum("oc,bchw->bohw", mix, levels[0]), 4)[:, 0] > 0
    head = build_head(name, (16,) * 4, 2, width=32)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(head(levels), truth.long()).backward()
        optimizer.step()
    assert (head(levels).argmax(1) == truth).float().mean() > 0.95  # half is chance


@pytest.mark.parametrize("name", ["linear", *DEEP])
def test_heads_work_under_autocast(name):
    torch.manual_seed(0)
    head, levels = build_head(name, (32,) * 4, 3, width=32), levels_of((32,) * 4)
    full = head(levels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = head(levels)
    assert F.cosine_similarity(full.flatten(1), half.float().flatten(1)).min() > 0.98
    half.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_faults_are_named():
    with pytest.raises(ValueError, match="unknown head 'unet': choose one of linear, upernet, dpt"):
        build_head("unet", (96,), 3)
    for width in (8, 33):
        with pytest.raises(ValueError, match=f"width={width} must be even and at least 16"):
            build_head("dpt", (96,), 3, width=width)
