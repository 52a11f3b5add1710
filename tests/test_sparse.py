"""Sparse encoding: which patches are kept, the short sequence against masked dense blocks, and who knows about it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gep import config
from gep.events.represent import REPRESENTATIONS, EventImage, build
from gep.events.types import EventBatch, Events
from gep.models import EventEncoder
from gep.models.sparse import background_of, choose, patch_activity, real_map
from stage1_align.task import Stage1Config

SIZE = (36, 36)


def encoder(keep: float | str = 0.5, **changes) -> EventEncoder:
    torch.manual_seed(1)
    return EventEncoder("nano", 2, SIZE, head_dim=96, keep=keep, **changes)


def window(height: int, width: int, patch: int, counts: list[int], channels: int = 2) -> Tensor:
    """(C, H, W) counts: so many events in the first pixels of each patch, raster order."""
    frame = torch.zeros(channels, height, width)
    for place, count in enumerate(counts):
        row, column = divmod(place, width // patch)
        for event in range(count):
            frame[event % channels, row * patch + event // patch % patch, column * patch + event % patch] += 1
    return frame


# Which patches.


def test_the_most_active_are_kept_and_ties_go_by_place() -> None:
    activity = torch.tensor([[0.0, 3, 1, 3, 0, 9, 1, 0, 0, 2], [0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    kept = choose(activity, 0.5)
    assert kept.index.tolist() == [[1, 2, 3, 5, 9], [0, 1, 2, 3, 4]] and kept.real is None
    assert real_map(kept, 10)[0].nonzero()[:, 0].tolist() == [1, 2, 3, 5, 9]
    assert choose(activity, 0.45).index.tolist()[0] == [1, 2, 3, 5, 9]  # rounded up
    assert choose(torch.zeros(1, 30), 0.1).index.shape == (1, 3)  # 0.1 * 30 is above 3 in floating point
    assert choose(activity, 0.01).index.tolist() == [[5], [0]]


def test_all_active_are_kept_and_padded_to_a_multiple_of_eight() -> None:
    activity = torch.zeros(3, 40)
    activity[0, ::4] = 2.0  # ten patches
    activity[1, 7] = 1.0
    kept = choose(activity, "active", 0)
    assert kept.index.shape == (3, 16) and kept.real.sum(1).tolist() == [10, 1, 1]
    assert torch.equal(real_map(kept, 40)[:2], activity[:2] > 0)
    assert real_map(kept, 40)[2].nonzero().tolist() == [[0]]  # no events: the first patch stands in
    assert choose(activity, "active", 5).index.shape == (3, 11)  # 16 with the prefix
    assert choose(torch.ones(1, 12), "active").index.shape == (1, 12)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_activity_is_zero_just_where_there_are_no_events(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 12, (40,), generator=generator), torch.randint(6, 24, (40,), generator=generator)
    polarity = torch.randint(0, 2, (40,), generator=generator)
    events = Events.from_arrays(range(1, 41), x.numpy(), y.numpy(), polarity.numpy(), height=36, width=24)
    represent = build(name)
    frames = represent(EventBatch.from_windows([events, Events.empty(36, 24)]))
    found = patch_activity(frames, (6, 12), background_of(represent))
    counts = torch.zeros(6, 2)
    for column, row in zip(x // 12, y // 6):
        counts[row, column] += 1
    assert torch.equal(found[0] > 0, counts.flatten() > 0) and found[1].eq(0).all()
    if name == "histogram":
        assert torch.equal(found[0], counts.flatten())


# The encoder.


def test_dense_is_what_it_was_to_the_bit() -> None:
    x = torch.rand(2, 2, *SIZE, generator=torch.Generator().manual_seed(0))
    for given in (1.0, 1):
        dense = encoder(given)
        assert dense.config["keep"] == 1.0 and dense.empty is None and dense.real(x) is None
        torch.manual_seed(1)
        plain = EventEncoder("nano", 2, SIZE, head_dim=96)
        assert list(plain.state_dict()) == list(dense.state_dict())
        tokens, pooled = dense(x)
        want = plain.vit.forward_features(x)
        assert torch.equal(tokens, want) and torch.equal(pooled, want.mean(1))
        assert torch.equal(dense.intermediates(x, 2)[0], plain.intermediates(x, 2)[0])
        tokens.square().sum().backward()
        want.square().sum().backward()
        for (name, one), other in zip(dense.vit.named_parameters(), plain.vit.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("keep", [0.4, "active"])
@pytest.mark.parametrize(
    "arch, size",
    [
        ("nano", (36, 24)),
        ("vit_tiny_patch16_224", (48, 64)),  # class token with a position
        ("vit_xsmall_patch16_clip_224", (48, 64)),  # norm before the blocks
        ("vit_little_patch16_reg4_gap_256", (48, 64)),  # registers, final norm elsewhere
        ("vit_small_patch16_dinov3", (48, 64)),  # rotary positions
    ],
)
def test_the_short_sequence_equals_dense_blocks_that_hide_the_rest(
    arch: str, size: tuple[int, int], keep: float | str
) -> None:
    torch.manual_seed(0)
    sparse = EventEncoder(arch, 2, size, keep=keep, mean=[0.1, 0.2], std=[0.5, 0.6])
    patch = sparse.patch_size[0]
    for name, value in sparse.vit.named_parameters():
        if "pos_embed" in name or "cls_token" in name or "reg_token" in name:
            torch.nn.init.normal_(value, std=0.3)
    num = math.prod(sparse.grid(*size))
    x = torch.stack([window(*size, patch, [(7 * place + 3) % 5 for place in range(num)]), torch.zeros(2, *size)])
    x[1, 0, :patch, -patch:] = 2.0
    real = sparse.real(x)
    if keep == "active":
        assert torch.equal(real[0], torch.tensor([(7 * place + 3) % 5 > 0 for place in range(num)]))
        assert real[1].nonzero()[:, 0].tolist() == [size[1] // patch - 1]
    else:
        assert real.sum(1).tolist() == [math.ceil(keep * num)] * 2

    vit, prefix = sparse.vit, sparse.num_prefix
    seen = torch.cat([torch.ones(2, prefix, dtype=torch.bool), real], dim=1)[:, None, None]
    whole = vit.forward_features((x - sparse._mean) / sparse._std, attn_mask=seen)
    norm = vit.fc_norm if isinstance(vit.norm, torch.nn.Identity) else torch.nn.Identity()
    want = norm(whole)[:, prefix:]
    tokens, pooled = sparse(x)
    assert tokens.shape == want.shape
    assert_close(tokens[real], want[real], atol=2e-5, rtol=1e-4)
    last = vit.norm if isinstance(norm, torch.nn.Identity) else norm
    assert_close(tokens[~real], last(sparse.empty).expand_as(tokens[~real]))
    assert_close(pooled[1], tokens[1][real[1]].mean(0))
    levels = sparse.intermediates(x, 2)
    assert torch.equal(levels[1], tokens) and torch.equal(levels[0][~real], tokens[~real])

    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((want * weight)[real].sum(), list(vit.parameters()), allow_unused=True)
    found = torch.autograd.grad((tokens * weight)[real].sum(), list(vit.parameters()), allow_unused=True)
    for (name, _), one, other in zip(vit.named_parameters(), found, wanted, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-5, name


def test_left_out_patches_move_nothing_but_their_place() -> None:
    sparse = encoder(0.25, background=0.0).eval()
    vit = EventEncoder("vit_tiny_patch16_224", 2, (48, 64), keep=0.25).eval()
    x = window(48, 64, 16, [9, 0, 8, 0, 0, 7, 0, 0, 0, 0, 0, 0])[None]
    with torch.no_grad():
        before = vit(x)[0]
        x[0, 0, 0, 20] += 1.0  # patch 1: one event, still less than the kept ones
        assert torch.equal(vit(x)[0], before)
    kept = sparse.real(torch.rand(3, 2, *SIZE))
    assert kept.sum(1).tolist() == [9, 9, 9]


@pytest.mark.parametrize("keep", [0.5, "active"])
def test_other_sizes_checkpointing_and_companions_change_nothing(keep: float | str) -> None:
    sparse = encoder(keep).eval()
    x = (torch.rand(3, 2, 48, 60, generator=torch.Generator().manual_seed(2)) > 0.98).float()
    x[2] = 0.0
    tokens, pooled = sparse(x)
    for row in range(3):  # alone, without the padding that the others ask for
        assert_close(sparse(x[row : row + 1])[0][0], tokens[row], atol=2e-5, rtol=1e-4)
    assert torch.isfinite(tokens).all() and torch.isfinite(pooled).all()
    assert_close(sparse.embed(x), sparse.head(pooled))
    tokens.sum().backward()
    grads = {name: value.grad.clone() for name, value in sparse.named_parameters() if value.grad is not None}
    assert "empty" in grads
    sparse.zero_grad()
    sparse.set_grad_checkpointing()
    sparse.train()
    sparse(x)[0].sum().backward()
    for name, value in sparse.named_parameters():
        if name in grads:
            assert_close(value.grad, grads[name], atol=1e-5, rtol=1e-4)


def test_a_wrong_keep_is_refused() -> None:
    for value in (0.0, 1.5, -1, True, "all"):
        with pytest.raises(ValueError, match=r"encoder\.keep=.*'active'"):
            encoder(value)
    for text, want in (("0.5", 0.5), ("1", 1.0), ("active", "active")):
        cfg = config.load(Stage1Config, [f"encoder.keep={text}"])
        built = cfg.encoder.build(in_chans=3, size=SIZE, head_dim=None, background=background_of(EventImage()))
        assert built.keep == want and built.background == (0.0 if want == 1.0 else 1.0)
        again = config.load(Stage1Config, [f"encoder.keep={cfg.encoder.keep}"])
        assert again == cfg
    with pytest.raises(ValueError, match=r"encoder\.keep='some'"):
        config.load(Stage1Config, ["encoder.keep=some"])
    with pytest.raises(ValueError, match="not a multiple"):
        encoder(0.5)(torch.zeros(1, 2, 35, 36))


@pytest.mark.slow
def test_a_fraction_compiles_without_breaks_into_one_graph() -> None:
    sparse = encoder(0.5).eval()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            x = (torch.rand(2, 2, *SIZE, generator=torch.Generator().manual_seed(seed)) > 0.5 + 0.2 * seed).float()
            assert_close(compiled(x)[0], sparse(x)[0], atol=1e-5, rtol=1e-5)
