"""The backbone: causality, clock invariance, cache against whole sequence, targets, attention."""

import math

import numpy as np
import pytest
import torch

from gep.models.backbone import EVENT, IMAGE, Backbone, KVCache
from gep.models.layers import Attention, RMSNorm, Rotary, Sight, SwiGLU, rotate
from gep.models.presets import BACKBONES, backbone_preset

GRID, DIM, FRAMES = (2, 3), 10, 4


def make(order: str = "frame", span: int | None = None, depth: int = 2) -> Backbone:
    torch.manual_seed(0)
    model = Backbone(DIM, width=24, depth=depth, heads=2, order=order, span=span)
    for p in model.parameters():  # larger than at the start, so that every path shows in the output
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def inputs(batch: int = 2, frames: int = FRAMES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, frames, 6, DIM, generator=g)
    modality = torch.randint(2, (batch, frames), generator=g)
    t_us = torch.randint(30_000, 70_000, (batch, frames), generator=g).cumsum(1)
    return tokens, modality, t_us


@pytest.mark.parametrize("order", ["frame", "token"])
@torch.no_grad()
def test_future_does_not_reach_the_past(order):
    model, (tokens, modality, t_us) = make(order), inputs()
    before = model(tokens, modality, t_us, GRID)
    for frame in range(FRAMES):
        for token in range(6):
            changed = tokens.clone()
            changed[:, frame, token, 0] += 3  # a shift of all channels the input norm would undo
            after = model(changed, modality, t_us, GRID)
            moved = (after.hidden - before.hidden).abs().amax(-1)[0] > 1e-6  # (F, N)
            index = torch.arange(FRAMES * 6).view(FRAMES, 6)
            expected = index >= frame * 6 + token if order == "token" else index >= frame * 6
            assert torch.equal(moved, expected.view(FRAMES, 6)), (frame, token)
    # Neither may the modality or the time of a later frame.
    later = model(tokens, torch.cat([modality[:, :3], 1 - modality[:, 3:]], 1), t_us, GRID)
    torch.testing.assert_close(later.hidden[:, :3], before.hidden[:, :3])
    t_late = torch.cat([t_us[:, :3], t_us[:, 3:] + 5_000], 1)
    shifted = model(tokens, modality, t_late, GRID)
    torch.testing.assert_close(shifted.next[:, :3], before.next[:, :3])
    assert (shifted.hidden[:, 3] - before.hidden[:, 3]).abs().max() > 1e-4


@torch.no_grad()
def test_only_time_differences_matter_and_unix_time_keeps_its_precision():
    model, (tokens, modality, t_us) = make(), inputs()
    want = model(tokens, modality, t_us, GRID).hidden
    unix = t_us + 1_700_000_000_000_000
    assert torch.equal(model(tokens, modality, unix, GRID).hidden, want)
    # Padding with a zero clock in front must not push the origin 50 years away.
    valid = torch.ones(2, FRAMES + 1, dtype=torch.bool)
    valid[:, 0] = False
    padded = [torch.cat([torch.zeros_like(x[:, :1]), x], 1) for x in (tokens, modality, unix)]
    got = model(*padded, GRID, valid=valid).hidden[:, 1:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="integer"):
        model(tokens, modality, t_us.float(), GRID)


@torch.no_grad()
def test_rotary_angles_and_their_inner_products():
    rotary = Rotary(24, min_us=1_000, max_us=10_000_000)
    t = torch.tensor([[0, 37_123]])
    cos, sin = rotary.angles((2, 3), t)
    frequencies = 100.0 ** (-np.arange(4) / 4)
    time = np.geomspace(1e-3, 1e-7, 4)
    for frame in range(2):
        for n in range(6):
            row, col = divmod(n, 3)
            angle = np.concatenate([row * frequencies, col * frequencies, t[0, frame].item() * time])
            np.testing.assert_allclose(cos[0, 0, frame * 6 + n].numpy(), np.cos(angle), atol=1e-6)
            np.testing.assert_allclose(sin[0, 0, frame * 6 + n].numpy(), np.sin(angle), atol=1e-6)
    # q.k depends on the difference of positions alone.
    q, k = torch.randn(2, 1, 1, 1, 24)
    at = lambda us: rotary.angles((1, 1), torch.tensor([[us]]))  # noqa: E731
    products = [(rotate(q, *at(a)) * rotate(k, *at(a + 40_000))).sum() for a in (0, 123_456, 7_654_321)]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)


@pytest.mark.parametrize("order", ["frame", "token"])
@pytest.mark.parametrize("span", [None, 1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_cache_equals_the_whole_sequence(order, span, padded):
    model, (tokens, modality, t_us) = make(order, span), inputs(frames=6)
    valid = None
    if padded:
        valid = torch.tensor([[True] * 6, [False, False, True, True, False, True]])
    following = torch.cat([modality[:, 1:], modality[:, :1]], 1)
    whole = model(tokens, modality, t_us, GRID, valid, next_modality=following)
    for chunks in ([1] * 6, [2, 1, 3]):
        cache, start = KVCache(), 0
        for size in chunks:
            s = slice(start, start + size)
            ok = None if valid is None else valid[:, s]
            part = model(tokens[:, s], modality[:, s], t_us[:, s], GRID, ok, cache, following[:, s])
            keep = torch.ones(2, size, dtype=torch.bool) if ok is None else ok
            for got, want in zip(part, whole):
                torch.testing.assert_close(got[keep], want[:, s][keep], atol=1e-5, rtol=1e-5)
            start += size
        assert cache.num_frames == (6 if span is None else min(6, span - 1))


@torch.no_grad()
def test_invalid_frames_are_not_seen():
    model, (tokens, modality, t_us) = make(), inputs()
    valid = torch.tensor([[True, False, True, True]] * 2)
    want = model(tokens, modality, t_us, GRID, valid).hidden
    other = tokens.clone()
    other[:, 1] = 100 * torch.randn(2, 6, DIM)
    got = model(other, modality, t_us, GRID, valid).hidden
    assert torch.equal(got[:, [0, 2, 3]], want[:, [0, 2, 3]])
    # ... which is the same as their not being there at all.
    rest = [0, 2, 3]
    short = model(tokens[:, rest], modality[:, rest], t_us[:, rest], GRID).hidden
    torch.testing.assert_close(want[:, rest], short, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(model(tokens, modality, t_us, GRID, torch.zeros(2, 4, dtype=torch.bool)).hidden).all()


@torch.no_grad()
def test_span_limits_what_a_frame_sees():
    model, (tokens, modality, t_us) = make(span=2, depth=1), inputs()
    want = model(tokens, modality, t_us, GRID).hidden
    tokens[:, 0, :, 0] += 3
    moved = (model(tokens, modality, t_us, GRID).hidden - want).abs().amax((0, 2, 3)) > 1e-6
    assert moved.tolist() == [True, True, False, False]


@torch.no_grad()
def test_next_head_is_chosen_by_the_next_modality():
    model, (tokens, modality, t_us) = make("token"), inputs()
    modality[:] = EVENT
    own = model(tokens, modality, t_us, GRID)
    image = model(tokens, modality, t_us, GRID, next_modality=torch.full_like(modality, IMAGE))
    assert torch.equal(own.hidden, image.hidden)
    assert torch.equal(own.next[:, :, :-1], image.next[:, :, :-1])  # inside the frame: still events
    per_modality = own.hidden @ model.next_head.weight.T + model.next_head.bias
    torch.testing.assert_close(own.next, per_modality[..., :DIM])
    torch.testing.assert_close(image.next[:, :, -1], per_modality[:, :, -1, DIM:])


def test_next_targets_shift_by_frame_or_token():
    tokens = torch.arange(2 * 3 * 2, dtype=torch.float32).view(2, 3, 2, 1)
    modality = torch.tensor([[0, 1, 0], [1, 0, 1]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    model = Backbone(1, width=12, depth=1, heads=2, order="frame")
    target = model.next_targets(tokens, valid, modality)
    assert target.tokens[..., 0].tolist() == [[[2, 3], [4, 5], [0, 0]], [[8, 9], [0, 0], [0, 0]]]
    assert target.mask[..., 0].tolist() == [[True, True, False], [True, False, False]]
    assert target.modality.tolist() == [[1, 0, 0], [0, 1, 1]]
    model = Backbone(1, width=12, depth=1, heads=2, order="token")
    target = model.next_targets(tokens, valid)
    assert target.tokens[..., 0].tolist() == [[[1, 2], [3, 4], [5, 0]], [[7, 8], [9, 0], [0, 0]]]
    assert target.mask.tolist() == [
        [[True, True], [True, True], [True, False]],
        [[True, True], [True, False], [False, False]],
    ]
    assert target.modality is None


@torch.no_grad()
def test_attention_against_a_float64_loop():
    torch.manual_seed(0)
    layer, length, heads, d = Attention(12, 2), 5, 2, 6
    layer.q_norm.weight.data.uniform_(0.5, 1.5)
    x, mask = torch.randn(1, length, 12), torch.rand(length, length) > 0.4
    mask |= torch.eye(length, dtype=torch.bool)
    angle = torch.randn(1, 1, length, d // 2)
    got, _ = layer(x, angle.cos(), angle.sin(), Sight(mask[None, None]))

    def rms(v, weight):
        return v / math.sqrt((v * v).mean() + 1e-6) * weight.double().numpy()

    def turn(v, a):
        c, s = np.cos(a), np.sin(a)
        return np.concatenate([v[:3] * c - v[3:] * s, v[3:] * c + v[:3] * s])

    qkv = (x[0].double().numpy() @ layer.qkv.weight.double().numpy().T).reshape(length, 3, heads, d)
    a, out = angle[0, 0].double().numpy(), np.zeros((length, heads, d))
    for h in range(heads):
        for i in range(length):
            q = turn(rms(qkv[i, 0, h], layer.q_norm.weight), a[i])
            score = np.full(length, -np.inf)
            for j in range(length):
                if mask[i, j]:
                    score[j] = q @ turn(rms(qkv[j, 1, h], layer.k_norm.weight), a[j]) / math.sqrt(d)
            p = np.exp(score - score.max())
            out[i, h] = (p / p.sum()) @ qkv[:, 2, h]
    want = out.reshape(length, 12) @ layer.out.weight.double().numpy().T
    np.testing.assert_allclose(got[0].numpy(), want, atol=1e-5)


def test_norm_and_feed_forward_are_their_formulas():
    x = torch.randn(3, 8)
    norm, layer = RMSNorm(8), SwiGLU(8, 16)
    norm.weight.data.uniform_(0.5, 2)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), want)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    gate, up = (x @ layer.gate_up.weight.T).split(16, dim=-1)
    torch.testing.assert_close(layer(x), (gate / (1 + (-gate).exp()) * up) @ layer.down.weight.T)


def test_every_parameter_learns_and_layers_are_numbered():
    model, (tokens, modality, t_us) = make(), inputs()
    modality[0] = torch.tensor([EVENT, IMAGE, EVENT, IMAGE])
    out = model(tokens, modality, t_us, GRID)
    (out.next.square().mean() + out.image.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    ids = {model.layer_id(name) for name, _ in model.named_parameters()}
    assert ids == {0, 1, 2, 3} and model.num_layers == 2
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@torch.no_grad()
def test_low_precision_stays_close_and_streams():
    model, (tokens, modality, t_us) = make(), inputs()
    want = model(tokens, modality, t_us, GRID)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(tokens, modality, t_us + 1_700_000_000_000_000, GRID)
        cache = KVCache()
        parts = [model(*(x[:, f : f + 1] for x in (tokens, modality, t_us)), GRID, cache=cache) for f in range(4)]
    scale = want.image.std()
    assert (got.image.float() - want.image).abs().mean() < 0.05 * scale
    assert (torch.cat([part.image for part in parts], 1).float() - want.image).abs().mean() < 0.05 * scale


def test_config_rebuilds_and_faults_are_named():
    model = make("token", span=3)
    again = Backbone(**model.config)
    again.load_state_dict(model.state_dict())
    tokens, modality, t_us = inputs()
    assert torch.equal(again(tokens, modality, t_us, GRID).next, model(tokens, modality, t_us, GRID).next)
    with pytest.raises(ValueError, match="grid"):
        model(tokens, modality, t_us, (2, 2))
    with pytest.raises(ValueError, match="token_dim"):
        model(tokens[..., :3], modality, t_us, GRID)
    for keywords in ({"order": "raster"}, {"heads": 5}, {"span": 0}, {"width": 20, "heads": 5}):
        with pytest.raises(ValueError, match="|".join(keywords)):
            Backbone(4, **{"width": 24, "depth": 1, "heads": 2, **keywords})
    with pytest.raises(ValueError, match="nano, small, base"):
        backbone_preset("huge")
    assert {name: Backbone(96, **backbone_preset("nano")).width for name in ["nano"]} == {"nano": 96}
    assert all(size["width"] % size["heads"] == 0 for size in BACKBONES.values())
