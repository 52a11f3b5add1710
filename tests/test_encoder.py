"""The event encoder: shapes for the heads, start from a teacher, layer numbers, config."""

import pytest
import timm
import torch
from torch import nn

from gep.models import PRESETS, EventEncoder, preset
from gep.models.vit import ConvStem

TINY = "vit_tiny_patch16_224"


def tiny(in_chans: int = 3, size: int = 32, **keywords) -> EventEncoder:
    torch.manual_seed(0)
    return EventEncoder(TINY, in_chans, (size, size), **keywords).eval()


def image_vit(size: int = 32, name: str = TINY, **keywords) -> nn.Module:
    torch.manual_seed(1)
    vit = timm.create_model(name, img_size=size, num_classes=5, **keywords)
    nn.init.normal_(vit.pos_embed, std=0.5)
    return vit.eval()


def tokens_of(vit: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return vit.forward_features(x)[:, vit.num_prefix_tokens :]


@torch.no_grad()
def test_started_from_a_teacher_it_gives_the_teachers_tokens():
    teacher, encoder = image_vit(), tiny()
    report = encoder.init_from(teacher)
    x = torch.randn(2, 3, 32, 32)
    tokens, pooled = encoder(x)
    assert torch.equal(tokens, tokens_of(teacher, x))
    torch.testing.assert_close(pooled, tokens.mean(1))
    assert report.left == () and report.adapted == () and report.unused == ("head.weight", "head.bias")
    assert len(report.copied) == len(encoder.vit.state_dict())
    again = tiny()
    again.init_from(encoder)  # an encoder is a teacher too
    assert torch.equal(again(x)[0], tokens)


@torch.no_grad()
def test_other_channels_answer_an_equal_input_alike():
    teacher = image_vit()
    for channels in (1, 2, 10):
        encoder = tiny(channels)
        report = encoder.init_from(teacher)
        assert [name for name, _ in report.adapted] == ["patch_embed.proj.weight"]
        # The same value in every channel excites each filter as it did, in the mean over channels.
        level = torch.randn(1, 1, 32, 32)
        want = teacher.patch_embed.proj(level.expand(1, 3, 32, 32))
        got = encoder.vit.patch_embed.proj(level.expand(1, channels, 32, 32))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert "patch_embed.proj.weight" in str(report) and "scaled by 3/10" in str(report)


@torch.no_grad()
def test_another_grid_gets_resampled_positions():
    teacher = image_vit(64, dynamic_img_size=True)
    encoder = tiny(size=32)
    report = encoder.init_from(teacher)
    assert report.adapted == (("pos_embed", "resampled from 4x4 to 2x2"),)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(x)[0], tokens_of(teacher, x))  # timm resamples on the fly


def test_what_does_not_fit_is_left_and_named():
    encoder = EventEncoder("nano", 2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    report = encoder.init_from(image_vit())
    assert set(report.left) == set(encoder.vit.state_dict()) and not report.copied
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert "blocks.0.attn.qkv.weight" in str(report)

    class NoTower:
        visual, visual_reason = None, "its tower is a ResNet"

    assert "its tower is a ResNet" in str(encoder.init_from_teacher(NoTower()))


@torch.no_grad()
def test_nano_has_36_normed_tokens_and_takes_other_sizes():
    torch.manual_seed(0)
    encoder = EventEncoder("nano", 2, (36, 36)).eval()
    assert (encoder.embed_dim, encoder.num_layers, encoder.num_prefix) == (96, 4, 0)
    assert encoder.patch_size == (6, 6) and encoder.grid(36, 48) == (6, 8)
    for size in ((36, 36), (36, 48), (60, 36)):
        tokens, pooled = encoder(torch.rand(2, 2, *size))
        h, w = encoder.grid(*size)
        assert tokens.shape == (2, h * w, 96) and pooled.shape == (2, 96)
        torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, h * w), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens.std(-1, unbiased=False), torch.ones(2, h * w), atol=1e-3, rtol=0)


@torch.no_grad()
def test_nano_stem_keeps_raster_order():
    stem = ConvStem((36, 48), 6, 2, 96)
    x = torch.zeros(1, 2, 36, 48)
    empty = stem(x)
    x[0, 0, 20, 33] = 5.0  # row 3, column 5 of the 6 x 8 grid
    moved = (stem(x) - empty).abs().sum(-1)[0]
    assert divmod(int(moved.argmax()), 8) == (3, 5)
    assert moved.gt(1e-6).nonzero()[:, 0].min() >= 2 and moved.gt(1e-6).nonzero()[:, 0].max() <= 4


@torch.no_grad()
def test_mean_and_std_are_applied_to_the_input():
    plain, normed = tiny(2), tiny(2, mean=[0.1, 0.2], std=[0.5, 2.0])
    normed.load_state_dict(plain.state_dict())
    x = torch.rand(1, 2, 32, 32)
    scaled = (x - torch.tensor([0.1, 0.2])[:, None, None]) / torch.tensor([0.5, 2.0])[:, None, None]
    torch.testing.assert_close(normed(x)[0], plain(scaled)[0])


@torch.no_grad()
def test_embed_takes_input_tokens_or_pooled():
    encoder = tiny(head_dim=7, head_hidden=11)
    x = torch.randn(2, 3, 32, 32)
    tokens, pooled = encoder(x)
    want = encoder.head(pooled)
    assert want.shape == (2, 7)
    for given in (x, tokens, pooled):
        torch.testing.assert_close(encoder.embed(given), want)
    assert torch.equal(tiny().embed(pooled), pooled)


def test_layers_decay_and_config():
    for encoder in (tiny(2, head_dim=4), EventEncoder("nano", 2, head_dim=4)):
        ids = {name: encoder.layer_id(name) for name, _ in encoder.named_parameters()}
        depth = encoder.num_layers
        assert set(ids.values()) == set(range(depth + 2))
        assert ids["vit.pos_embed"] == 0 and ids["vit.blocks.0.norm1.weight"] == 1
        assert ids[f"vit.blocks.{depth - 1}.mlp.fc2.bias"] == depth and ids["head.weight"] == depth + 1
        assert all(i == 0 for name, i in ids.items() if "patch_embed" in name)
        assert "vit.pos_embed" in encoder.no_weight_decay() <= set(ids)
        again = EventEncoder(**encoder.config)
        again.load_state_dict(encoder.state_dict())
        assert again.config == encoder.config


@torch.no_grad()
def test_every_preset_builds_and_reports_its_grid():
    for name, chosen in PRESETS.items():
        with torch.device("meta"):
            encoder = EventEncoder(preset(name).arch, 2, chosen.img_size)
        side = chosen.img_size[0] // encoder.patch_size[0]
        assert encoder.grid(*chosen.img_size) == (side, side)
        assert "attn_pool" not in dict(encoder.vit.named_children())


def test_all_parameters_get_a_gradient():
    for encoder in (tiny(2), EventEncoder("nano", 2)):
        tokens, pooled = encoder(torch.randn(2, 2, *encoder.config["img_size"]))
        (tokens.square().sum() + pooled.sum()).backward()
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: EventEncoder("vit_enormous", 2), "unknown encoder arch 'vit_enormous'"),
        (lambda: EventEncoder("resnet18", 2), "unknown encoder arch 'resnet18'"),
        (lambda: EventEncoder("nano", 2, (34, 34)), "resize it to 36x36"),
        (lambda: EventEncoder("nano", 2, mean=[0.0]), "in_chans = 2"),
        (lambda: preset("large"), "nano, small, base, small_dinov3, clip_b16"),
    ],
)
def test_errors_name_the_fault(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
