"""LLM-EvRep's generators and edge maps: against loops and timm's own network, at any size, sample by sample."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual
from torch import nn

from downstream.llm_evrep.fidelity import fidelity_loss, sobel_magnitude
from downstream.llm_evrep.generator import EvGen, build_generator
from downstream.llm_evrep.gep_init import GEPGenerator, gep_generator
from gep.data.config import DataConfig
from gep.events.represent import Histogram, Tencode
from gep.hub import GEPModel
from gep.models import EventEncoder


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def loop_sobel(image: np.ndarray) -> np.ndarray:
    """(3, H, W) -> (H, W), in float64, with nothing but loops."""
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    height, width = grey.shape
    kernel = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            gx = gy = 0.0
            for i in range(3):
                for j in range(3):
                    value = grey[min(max(y + i - 1, 0), height - 1), min(max(x + j - 1, 0), width - 1)]
                    gx += kernel[i][j] * value
                    gy += kernel[j][i] * value
            out[y, x] = np.sqrt(gx * gx + gy * gy + 1e-6)
    return out


def test_sobel_of_a_step_by_hand():
    step = torch.zeros(1, 3, 4, 6)
    step[..., 3:] = 1
    edges = sobel_magnitude(step)
    assert edges.shape == (1, 1, 4, 6) and edges.dtype == torch.float32
    # Replicated borders: no edge along the frame, and 1 + 2 + 1 on both sides of the step, in every row.
    assert torch.allclose(edges[0, 0], torch.tensor([0.001, 0.001, 4, 4, 0.001, 0.001]).expand(4, 6), atol=1e-6)
    assert torch.allclose(sobel_magnitude(step.mT), edges.mT)
    colours = torch.stack([step[:, 0], 1 - step[:, 0] * 0.299 / 0.587, step[:, 2] * 0], dim=1)
    assert sobel_magnitude(colours).max() < 0.0011  # another hue, the same luminance: no edge


def test_sobel_and_its_loss_against_loops():
    one, two = random(2, 3, 7, 9), random(2, 3, 7, 9, seed=1)
    maps = [np.stack([loop_sobel(image) for image in images.double().numpy()]) for images in (one, two)]
    assert np.allclose(sobel_magnitude(one)[:, 0].numpy(), maps[0], atol=1e-5)
    assert fidelity_loss(one, two).item() == pytest.approx(np.square(maps[0] - maps[1]).mean(), rel=1e-5)
    # One channel is the luminance itself; bytes are 255ths.
    grey = one[:, :1]
    assert torch.allclose(sobel_magnitude(grey), sobel_magnitude(grey.expand(-1, 3, -1, -1)), atol=1e-6)
    raw = (255 * two).round().byte()
    assert torch.equal(fidelity_loss(one, raw), fidelity_loss(one, raw.float() / 255))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sobel_magnitude(one), sobel_magnitude(one.clone()))
        assert fidelity_loss(one.bfloat16().float(), two).dtype == torch.float32


def test_flat_images_have_a_finite_gradient_and_wrong_ones_are_named():
    images = torch.full((1, 3, 5, 5), 0.5, requires_grad=True)
    fidelity_loss(images, random(1, 3, 5, 5)).backward()
    assert torch.isfinite(images.grad).all()
    with pytest.raises(ValueError, match="one canvas"):
        fidelity_loss(random(1, 3, 5, 5), random(1, 3, 5, 6))
    with pytest.raises(ValueError, match="shape"):
        sobel_magnitude(random(1, 2, 5, 5))


def gep_like(windows: int = 2, **options) -> GEPGenerator:
    torch.manual_seed(0)
    return GEPGenerator(EventEncoder("nano", 3, (36, 36), head_dim=8, drop_path=0.5), windows=windows, **options)


def make(name: str, in_chans: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return gep_like() if name == "gep" else build_generator(name, in_chans=in_chans)


@pytest.mark.parametrize("name", ["nano", "small", "gep"])
def test_an_image_of_any_size_begins_mid_grey_and_is_the_padded_one_cropped(name):
    generator = make(name).eval()
    for height, width in ((1, 1), (34, 41), (36, 48)):
        frames = random(2, 6, height, width)
        with torch.no_grad():
            image = generator(frames)
            step = (6, 6) if name == "gep" else (4, 4) if name == "nano" else (16, 16)
            down, right = -height % step[0], -width % step[1]
            whole = generator(F.pad(frames, (0, right, 0, down)))
        assert image.shape == (2, 3, height, width) and image.dtype == torch.float32
        assert (image - 0.5).abs().max() < 0.1
        # Kernels differ by size in the last bit.
        assert torch.allclose(image, whole[..., :height, :width], rtol=0, atol=1e-5)
        assert (image[0] - image[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="6, H, W"):
        generator(random(1, 3, 36, 36))


@pytest.mark.parametrize("name", ["nano", "small", "gep"])
def test_the_image_of_a_sample_does_not_depend_on_its_batch(name):
    generator, frames = make(name).eval(), random(3, 6, 36, 36)
    with torch.no_grad():
        together = generator(frames)
        alone = torch.cat([generator(frame[None]) for frame in frames])
        assert torch.allclose(together, alone, atol=1e-5)
        assert (together[0] - together[1]).abs().max() > 1e-3  # the samples do differ
        if name != "gep":  # whose encoder has stochastic depth
            assert torch.equal(generator.train()(frames), together)
    assert not any(isinstance(part, nn.modules.batchnorm._NormBase) for part in generator.modules())


@pytest.mark.parametrize("name", ["nano", "small", "gep"])
def test_every_weight_takes_part(name):
    generator = make(name).eval()
    (generator(random(2, 6, 36, 36)) * random(2, 3, 36, 36, seed=1)).sum().backward()
    idle = [key for key, value in generator.named_parameters() if value.grad is None or not value.grad.any()]
    # Of an encoder, the head is not read.
    assert idle == ([f"encoder.head.{part}" for part in ("weight", "bias")] if name == "gep" else [])


def test_small_has_the_stages_of_efficientnet_v2_s():
    own, timms = build_generator("small", in_chans=3), timm.create_model("efficientnetv2_s").blocks
    for number in (1, 2, 3, 4):
        shapes = [
            [tuple(part.weight.shape) for part in stage.modules() if isinstance(part, nn.Conv2d)]
            for stage in (own.down[number], timms[number])
        ]
        assert shapes[0] == shapes[1] and shapes[0]
    kinds = [type(stage[0]) for stage in own.down]
    assert kinds == [EdgeResidual] * 3 + [InvertedResidual] * 2
    assert [type(stage[0]) for stage in own.up] == kinds[3::-1]
    assert sum(value.numel() for value in own.parameters()) == 6_489_827


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="nano, small"):
        build_generator("large", in_chans=3)
    good = {"widths": (8, 16), "depths": (1, 1), "expand": (1, 2), "fused": 1, "decoder_depth": 1}
    EvGen(3, **good)
    for change in ({"widths": (8, 12)}, {"depths": (1,)}, {"depths": (1, 0)}, {"decoder_depth": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            EvGen(3, **(good | change))
    with pytest.raises(ValueError, match="num_levels=9"):
        gep_like(num_levels=9)


def test_nano_learns_the_edges_of_frames():
    torch.manual_seed(0)
    generator = build_generator("nano", in_chans=3)
    yy, xx = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    centres = 5 + 6 * random(16, 2, 1, 1)
    discs = ((yy - centres[:, 0]) ** 2 + (xx - centres[:, 1]) ** 2 < 9).float()[:, None].expand(-1, 3, -1, -1)
    outline = (sobel_magnitude(discs) > 1).float().expand(-1, 3, -1, -1)
    optim = torch.optim.AdamW(generator.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = fidelity_loss(generator(outline), discs)
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


def test_the_encoder_sees_each_window_as_it_was_trained():
    generator = gep_like(frame_scale=255.0).eval()
    frames = random(2, 6, 36, 30)
    with torch.no_grad():
        maps = generator._tokens(frames)
        for window in (0, 1):
            own = generator.encoder.intermediates(255 * frames[:, 3 * window : 3 * window + 3], 4)
            expected = torch.cat(own, dim=-1).transpose(1, 2).reshape(2, 4 * 96, 6, 5)
            assert torch.allclose(maps[:, 384 * window : 384 * (window + 1)], expected, atol=1e-5)


def test_a_frozen_encoder_stays_as_it_is():
    frozen, free = gep_like(freeze=True).train(), gep_like().train()
    frames, target = random(2, 6, 36, 36), random(2, 3, 36, 36, seed=1)
    for generator in (frozen, free):
        (generator(frames) * target).sum().backward()
    assert all(value.grad is None for value in frozen.encoder.parameters())
    assert frozen.read[0].weight.grad.any() and free.encoder.vit.blocks[0].attn.qkv.weight.grad.any()
    # Stochastic depth is off in the frozen one, and on in the other.
    assert torch.equal(frozen(frames), frozen(frames)) and not frozen.encoder.training
    assert not torch.equal(free(frames), free(frames)) and free.encoder.training


@pytest.mark.parametrize(("represent", "scale"), [(Tencode(), 255.0), (Histogram(log1p=True), 1.0)])
def test_a_generator_starts_from_an_export(tmp_path, represent, scale):
    encoder = EventEncoder("nano", represent.channels, (36, 36), mean=[0.5] * represent.channels)
    GEPModel.from_parts(encoder, represent, DataConfig(windows=4)).save_pretrained(tmp_path / "gep")
    generator, own = gep_generator(tmp_path / "gep", windows=3, freeze=True)
    assert own == represent and generator.frame_scale == scale and generator.in_chans == 3 * represent.channels
    assert generator.training and not generator.encoder.training
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in generator.encoder.state_dict().items())
    assert generator.encoder.config["mean"] == [0.5] * represent.channels
    with pytest.raises(ValueError, match="nano, small"):
        gep_generator(tmp_path / "gep", preset="big")


def test_what_is_padded_counts_as_no_events_where_patches_are_left_out() -> None:
    """An image-like representation is 1 where there is nothing; frames come divided by `frame_scale`."""
    encoder = EventEncoder("nano", 3, (36, 36), keep="active", background=1.0)
    generator = GEPGenerator(encoder, windows=1, frame_scale=4.0).eval()
    frames = torch.full((1, 3, 34, 41), 0.25)
    frames[..., 8, 9] = 0.0
    seen = []
    plain, encoder.intermediates = encoder.intermediates, lambda x, num: seen.append(x) or plain(x, num)
    with torch.no_grad():
        assert generator(frames).shape == (1, 3, 34, 41)
    active = encoder.real(seen[0])[0]
    assert seen[0].shape[-2:] == (36, 42) and active.nonzero().flatten().tolist() == [1 * 7 + 1]
