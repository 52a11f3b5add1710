"""Maps of tokens: what is read of which window and depth, padding, and the baseline of counted events."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from downstream.common import window_features
from downstream.dense.features import DenseFeatures, HistogramFeatures, features_from_config
from gep.events.represent import Histogram
from gep.events.types import EventBatch, Events
from gep.hub import GEPModel
from gep.models import Backbone, EventEncoder
from gep.models.backbone import KVCache
from gep.models.vit import spread_depths


def make(backbone: bool = True, order: str = "frame", depth: int = 3, **changes) -> GEPModel:
    torch.manual_seed(0)
    settings = {"height": 36, "width": 36, "fit": "pad", "windows": 3, "window_us": 50_000, "num_events": 0}
    encoder = EventEncoder("nano", 2, (36, 36), head_dim=96, **changes)
    stack = Backbone(96, width=48, depth=depth, heads=2, order=order) if backbone else None
    return GEPModel.from_parts(encoder, Histogram(), SimpleNamespace(**settings), backbone=stack).eval()


def windows(batch: int = 2, num: int = 3, height: int = 36, width: int = 36) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    ends = 1_700_000_000_000_000 + torch.arange(1, num + 1).expand(batch, num) * 50_000
    return torch.rand(batch, num, 2, height, width, generator=g), ends


def batch_of(height: int = 34, width: int = 40, samples: int = 2, num: int = 3) -> dict:
    g = np.random.default_rng(0)
    parts, bounds = [], []
    for _ in range(samples):
        for i in range(num):
            t = np.sort(g.integers(i * 1000, (i + 1) * 1000, 200))
            x, y, p = g.integers(0, width, 200), g.integers(0, height, 200), g.integers(0, 2, 200)
            parts.append(Events.from_arrays(t, x, y, p, height=height, width=width))
            bounds.append([i * 1000, (i + 1) * 1000])
    bounds = np.array(bounds)
    t_us = torch.from_numpy(bounds).unflatten(0, (samples, num))
    return {"events": EventBatch.from_windows(parts, bounds), "windows": num, "t_us": t_us}


@pytest.mark.parametrize(
    "layers, num, depths",
    [(12, 4, [3, 6, 9, 12]), (4, 4, [1, 2, 3, 4]), (3, 4, [1, 2, 2, 3]), (1, 3, [1, 1, 1]), (12, 1, [12])],
)
def test_depths_are_spread_evenly_and_end_at_the_last(layers, num, depths):
    assert spread_depths(layers, num) == depths


def test_intermediates_are_the_blocks_outputs_through_the_final_norm():
    encoder = EventEncoder("vit_tiny_patch16_224", 2, (32, 48), mean=[0.1, 0.2], std=[0.3, 0.4]).eval()
    torch.nn.init.normal_(encoder.vit.norm.weight)
    x, states = windows()[0][0, :, :, :32].repeat(1, 1, 1, 2)[..., :48], {}
    for i, block in enumerate(encoder.vit.blocks):
        block.register_forward_hook(lambda _m, _i, out, i=i: states.update({i + 1: out}))
    levels = encoder.intermediates(x, 4)
    for depth, level in zip((3, 6, 9, 12), levels, strict=True):
        assert torch.allclose(level, encoder.vit.norm(states[depth])[:, 1:], atol=1e-6)
    assert torch.equal(levels[-1], encoder(x)[0])  # normalised input, class token left out
    for num in (0, 13):
        with pytest.raises(ValueError, match=f"{num} depths of an encoder with 12 blocks"):
            encoder.intermediates(x, num)


def test_models_with_another_final_norm_agree_too():
    encoder = EventEncoder("vit_small_patch16_dinov3", 2, (32, 48)).eval()
    x = torch.rand(1, 2, 48, 64, generator=torch.Generator().manual_seed(0))
    levels = encoder.intermediates(x, 2)
    assert torch.equal(levels[-1], encoder(x)[0]) and levels[0].shape == (1, 12, 384)


@pytest.mark.parametrize("order", ["frame", "token"])
def test_the_backbones_states_stream_and_leave_forward_as_it_is(order):
    backbone = make(order=order).backbone
    tokens = torch.randn(2, 3, 12, 96, generator=torch.Generator().manual_seed(0))
    ends, modality = windows()[1], torch.zeros(2, 3, dtype=torch.int64)
    states = {}
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, i=i: states.update({i + 1: out[0]}))
        for i, block in enumerate(backbone.blocks)
    ]
    output, found = backbone.intermediates(tokens, modality, ends, (3, 4), [1, 2, 2, 3])
    for hook in hooks:
        hook.remove()
    for depth, state in zip((1, 2, 2, 3), found, strict=True):
        assert torch.equal(state, backbone.norm(states[depth]).view(2, 3, 12, 48))
    plain = backbone(tokens, modality, ends, (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(plain, output)) and torch.equal(found[-1], plain.hidden)
    cache = KVCache()
    for i in range(3):
        one = slice(i, i + 1)
        now, streamed = backbone.intermediates(tokens[:, one], modality[:, one], ends[:, one], (3, 4), [1, 3], cache)
        assert torch.allclose(streamed[0], found[0][:, one], atol=1e-5)
        assert torch.allclose(now.image, plain.image[:, one], atol=1e-5)
    with pytest.raises(ValueError, match=r"depths \[0, 4\] of a backbone with 3 blocks"):
        backbone.intermediates(tokens, modality, ends, (3, 4), [0, 2, 4])


def test_levels_are_the_encoders_and_the_backbones_side_by_side():
    model = make()
    features, (frames, ends) = DenseFeatures(model, num_levels=4), windows()
    maps = features(frames, ends)
    assert features.channels == (144, 144, 144, 240) and features.patch_size == (6, 6)
    assert [tuple(level.shape) for level in maps.levels] == [(2, dim, 6, 6) for dim in features.channels]
    assert maps.size == maps.padded == (36, 36)
    alone = model.encoder.intermediates(frames[:, -1], 4)
    for level, own in zip(maps.levels, alone):
        assert torch.equal(level[:, :96], own.transpose(1, 2).unflatten(2, (6, 6)))
    out = model(frames, ends)
    deepest = torch.cat([out.tokens, out.hidden, out.image], dim=-1)[:, -1]
    assert torch.allclose(maps.levels[-1].flatten(2).mT, deepest, atol=1e-5)
    # A level's backbone part is of the same relative depth: 3 blocks for 4 levels, so that two share a state.
    assert torch.equal(maps.levels[1][:, 96:], maps.levels[2][:, 96:])
    assert not torch.equal(maps.levels[0][:, 96:], maps.levels[1][:, 96:])


def test_the_backbones_states_alone_are_those_beside_the_encoders_maps():
    model, (frames, ends) = make(), windows()
    both, alone = DenseFeatures(model, num_levels=2), DenseFeatures(model, num_levels=2, encoder_maps=False)
    assert alone.channels == (48, 144)
    for level, wide in zip(alone(frames, ends).levels, both(frames, ends).levels, strict=True):
        assert torch.equal(level, wide[:, 96:])
    again = DenseFeatures.from_config(alone.config)
    assert again.channels == alone.channels and not again.encoder_maps
    old = {name: value for name, value in both.config.items() if name != "encoder_maps"}
    assert DenseFeatures.from_config(old).encoder_maps
    # Without a backbone there is nothing else to read.
    assert DenseFeatures(model, use_backbone=False, num_levels=1, encoder_maps=False).channels == (96,)


def test_a_batch_gives_the_features_that_recognition_reads():
    model, batch = make(), batch_of(36, 42)
    features = DenseFeatures(model, num_levels=1)
    frames = features.frames(batch)
    assert frames.shape == (2, 3, 2, 36, 42) and frames.sum() == 2 * 3 * 200
    last = features(frames, batch["t_us"][..., 1]).levels[0].mean(dim=(2, 3))
    pooled = window_features(model, batch)
    assert torch.allclose(last[:, :96], pooled.encoder[:, -1], atol=1e-5)
    assert torch.allclose(last[:, 96:144], pooled.window[:, -1, 96:], atol=1e-5)
    assert torch.allclose(last[:, 144:], pooled.image[:, -1], atol=1e-5)


@pytest.mark.parametrize("order", ["frame", "token"])
def test_the_past_is_read_and_the_future_is_not(order):
    features, (frames, ends) = DenseFeatures(make(order=order), num_levels=4), windows()
    whole = features(frames, ends).levels
    changed = frames.clone()
    changed[:, 0] = frames[:, 0].flip(-1)
    for before, after in zip(whole, features(changed, ends).levels):
        assert torch.equal(before[:, :96], after[:, :96])  # the encoder sees the last window alone
        assert (before[:, 96:] - after[:, 96:]).abs().max() > 1e-3
    # What the backbone says after two windows is the same whatever the third holds.
    seen = []
    run = features.backbone.intermediates
    features.backbone.intermediates = lambda *args: seen.append(run(*args)) or seen[-1]
    other = frames.clone()
    other[:, 2] = 1 - frames[:, 2]
    features(frames, ends), features(other, ends)
    for one, two in zip(seen[0][1], seen[1][1]):
        assert torch.allclose(one[:, :2], two[:, :2], atol=1e-6) and not torch.allclose(one[:, 2], two[:, 2], atol=1e-2)
    first = features(frames[:, :2], ends[:, :2]).levels
    for depth, level in enumerate(first):
        state = seen[1][1][depth][:, 1].mT.unflatten(-1, (6, 6))
        assert torch.allclose(level[:, 96:144], state, atol=1e-5)


@pytest.mark.parametrize("kept", ["model without", "not used"])
def test_without_a_backbone_the_last_window_alone_is_read(kept):
    model = make(backbone=kept == "not used")
    features, (frames, ends) = DenseFeatures(model, use_backbone=False, num_levels=2), windows()
    calls = []
    model.encoder.vit.patch_embed.register_forward_hook(lambda _m, given, _o: calls.append(len(given[0])))
    levels = features(frames, ends).levels
    assert calls == [2] and features.channels == (96, 96)
    assert not any(name.startswith("backbone") for name, _ in features.named_parameters())
    other = frames.clone()
    other[:, :-1] = 0
    for one, two, three in zip(levels, features(other).levels, features(frames[:, -1:]).levels):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("kind", ["dense", "histogram"])
@pytest.mark.parametrize("size", [(34, 41), (1, 7), (36, 48)])
def test_any_canvas_is_padded_with_zeros_at_the_bottom_and_right(kind, size):
    model = make()
    features = DenseFeatures(model) if kind == "dense" else HistogramFeatures(model, windows=3)
    frames, ends = windows(height=size[0], width=size[1])
    padded = -(-size[0] // 6) * 6, -(-size[1] // 6) * 6
    canvas = torch.zeros(2, 3, 2, *padded)
    canvas[..., : size[0], : size[1]] = frames
    maps, whole = features(frames, ends), features(canvas, ends)
    assert maps.size == size and maps.padded == whole.size == whole.padded == padded
    for one, two in zip(maps.levels, whole.levels, strict=True):
        assert torch.equal(one, two) and one.shape[2:] == (padded[0] // 6, padded[1] // 6)


def test_heads_that_nothing_reads_take_no_gradient_and_all_else_does():
    model = make()
    features, (frames, ends) = DenseFeatures(model), windows()
    sum((level * torch.randn_like(level)).sum() for level in features(frames, ends).levels).backward()
    for name, parameter in features.named_parameters():
        unread = name.startswith(("encoder.head.", "backbone.next_head."))
        assert parameter.requires_grad != unread, name
        assert (parameter.grad is None) == unread, name


def test_faults_are_named():
    model, (frames, _) = make(), windows()
    with pytest.raises(ValueError, match="num_levels=5, the encoder has 4 blocks"):
        DenseFeatures(model, num_levels=5)
    with pytest.raises(ValueError, match="t_us is needed"):
        DenseFeatures(model)(frames)
    with pytest.raises(ValueError, match="3 windows, the histogram features were made for 2"):
        HistogramFeatures(model, windows=2)(frames)
    with pytest.raises(ValueError, match="unknown features 'x': choose one of dense, histogram"):
        features_from_config({"name": "x"})


def test_histogram_features_are_a_patchs_pixels_by_hand():
    model, batch = make(backbone=False), batch_of(34, 40)
    features = HistogramFeatures(model, windows=3)
    frames = features.frames(batch)
    (level,) = features(frames, batch["t_us"][..., 1]).levels
    assert features.channels == (3 * 2 * 36,) and level.shape == (2, 216, 6, 7) and not list(features.parameters())
    canvas = np.zeros((2, 3, 2, 36, 42), dtype=np.float32)
    canvas[..., :34, :40] = frames.numpy()
    for b, t, c, row, column in np.ndindex(2, 3, 2, 36, 42):
        channel = ((t * 2 + c) * 6 + row % 6) * 6 + column % 6
        assert level[b, channel, row // 6, column // 6] == canvas[b, t, c, row, column]
    assert level.sum() == 2 * 3 * 200  # every event is counted once


def test_a_config_rebuilds_either():
    model = make(mean=[0.1, 0.2], std=[1.0, 2.0])
    for features in (
        DenseFeatures(model, num_levels=3),
        DenseFeatures(model, use_backbone=False),
        HistogramFeatures(model, windows=3),
    ):
        again = features_from_config(features.config)
        again.load_state_dict(features.state_dict())
        assert again.config == features.config and again.channels == features.channels
        frames, ends = windows(height=30, width=31)
        assert all(torch.equal(a, b) for a, b in zip(again.eval()(frames, ends).levels, features(frames, ends).levels))


def test_levels_are_float32_under_autocast_and_close_to_full_precision():
    features, (frames, ends) = DenseFeatures(make()), windows(height=34, width=41)
    full = features(frames, ends)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = features(frames, ends)
    for one, two in zip(full.levels, half.levels):
        assert two.dtype == torch.float32 and two.shape == one.shape
        assert F.cosine_similarity(one.flatten(1), two.flatten(1)).min() > 0.99 and not torch.equal(one, two)
