"""E2VID on random weights in the published layout, against a second implementation in float64."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from downstream.llm_evrep.sources import build_source
from downstream.llm_evrep.sources.e2vid import ConvLSTM, ResidualBlock, load_e2vid, normalised, padded, stretched
from downstream.llm_evrep.sources.windows import voxels
from gep.data.config import DataConfig
from tests.evrep_weights import Layout, make_batch

PUBLIC = {
    "num_bins": 5,
    "skip_type": "sum",
    "recurrent_block_type": "convlstm",
    "num_encoders": 3,
    "base_num_channels": 32,
    "num_residual_blocks": 2,
    "use_upsample_conv": False,
    "norm": "BN",
}


def e2vid_file(path: Path, seed: int = 0, **options: object) -> tuple[Path, OrderedDict[str, Tensor]]:
    """A checkpoint as the published one is laid out, in the format of the torch of its time."""
    model = {**PUBLIC, **options}
    norm, width, levels = model["norm"] == "BN", model["base_num_channels"], model["num_encoders"]
    layout = Layout(seed)

    def conv(name: str, norm_name: str, out: int, inputs: int, kernel: int, transposed: bool = False) -> None:
        shape = (inputs, out) if transposed else (out, inputs)
        layout.weight(name, *shape, kernel, kernel, bias=0 if norm else out)
        if norm:
            layout.norm(norm_name, out, running=True)

    start = "unetrecurrent."
    layout.weight(f"{start}head.conv2d", width, model["num_bins"], 5, 5, bias=width)
    for level in range(levels):
        inputs, out, name = width * 2**level, width * 2 ** (level + 1), f"{start}encoders.{level}."
        conv(f"{name}conv.conv2d", f"{name}conv.norm_layer", out, inputs, 5)
        layout.weight(f"{name}recurrent_block.Gates", 4 * out, 2 * out, 3, 3, bias=4 * out)
    deepest = width * 2**levels
    for block in range(model["num_residual_blocks"]):
        for number in (1, 2):
            name = f"{start}resblocks.{block}."
            conv(f"{name}conv{number}", f"{name}bn{number}", deepest, deepest, 3)
    for number in range(levels):
        inputs, name = deepest // 2**number, f"{start}decoders.{number}."
        kind = "conv2d" if model["use_upsample_conv"] else "transposed_conv2d"
        conv(f"{name}{kind}", f"{name}norm_layer", inputs // 2, inputs, 5, not model["use_upsample_conv"])
    conv(f"{start}pred.conv2d", f"{start}pred.norm_layer", 1, width, 1)
    held = {"arch": "E2VIDRecurrent", "model": model, "state_dict": layout.state}
    torch.save(held, path, _use_new_zipfile_serialization=False)
    return path, layout.state


def np_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, stride: int = 1) -> np.ndarray:
    """Convolution (C, H, W) -> (O, h, w) with zeros around, as a sum over the kernel's places."""
    kernel = weight.shape[-1]
    x = np.pad(x, ((0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
    rows, cols = ((side - kernel) // stride + 1 for side in x.shape[1:])
    out = np.zeros((len(weight), rows, cols))
    for i in range(kernel):
        for j in range(kernel):
            part = x[:, i : i + stride * rows : stride, j : j + stride * cols : stride]
            out += np.tensordot(weight[:, :, i, j], part, axes=1)
    return out if bias is None else out + bias[:, None, None]


def np_transposed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Twice the size: every pixel puts a 5x5 stamp around its double."""
    _, rows, cols = x.shape
    out = np.zeros((weight.shape[1], 2 * rows + 4, 2 * cols + 4))
    for i in range(5):
        for j in range(5):
            out[:, i : i + 2 * rows : 2, j : j + 2 * cols : 2] += np.tensordot(weight[:, :, i, j].T, x, axes=1)
    out = out[:, 2 : 2 + 2 * rows, 2 : 2 + 2 * cols]
    return out if bias is None else out + bias[:, None, None]


def np_doubled(x: np.ndarray) -> np.ndarray:
    """Twice the size, bilinear: 3/4 of the nearest pixel and 1/4 of the next, at the border the pixel itself."""
    for axis in (1, 2):
        edge = np.concatenate([x.take([0], axis), x, x.take([-1], axis)], axis)
        before, here, after = (np.roll(edge, shift, axis) for shift in (1, 0, -1))
        pair = np.stack([0.75 * here + 0.25 * before, 0.75 * here + 0.25 * after], axis + 1)
        shape = list(edge.shape)
        shape[axis] *= 2
        x = pair.reshape(shape).take(range(2, shape[axis] - 2), axis)
    return x


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class NumpyE2VID:
    """The description of the paper on the tensors of the file, one sample at a time."""

    def __init__(self, state: dict[str, Tensor], upsample: bool):
        self.state = {name.removeprefix("unetrecurrent."): value.double().numpy() for name, value in state.items()}
        self.upsample = upsample
        self.memory: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def normed(self, x: np.ndarray, name: str) -> np.ndarray:
        if f"{name}.weight" not in self.state:
            return x
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (self.state[f"{name}.{own}"][:, None, None] for own in names)
        return weight * (x - mean) / np.sqrt(var + 1e-5) + bias

    def conv(self, x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        return np_conv(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), stride)

    def lstm(self, x: np.ndarray, name: str, key: int) -> np.ndarray:
        hidden, cell = self.memory.get(key, (np.zeros_like(x), np.zeros_like(x)))
        gates = self.conv(np.concatenate([x, hidden]), f"{name}.Gates")
        count = len(x)
        i, f, o, g = (gates[k * count : (k + 1) * count] for k in range(4))
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        self.memory[key] = (hidden, cell)
        return hidden

    def residual(self, x: np.ndarray, name: str) -> np.ndarray:
        y = np.maximum(self.normed(self.conv(x, f"{name}conv1"), f"{name}bn1"), 0)
        return np.maximum(x + self.normed(self.conv(y, f"{name}conv2"), f"{name}bn2"), 0)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        head = x = np.maximum(self.conv(x, "head.conv2d"), 0)
        skips = []
        for level in range(3):
            name = f"encoders.{level}"
            x = self.normed(self.conv(x, f"{name}.conv.conv2d", stride=2), f"{name}.conv.norm_layer")
            x = self.lstm(np.maximum(x, 0), f"{name}.recurrent_block", level)
            skips.append(x)
        for block in range(2):
            x = self.residual(x, f"resblocks.{block}.")
        for number in range(3):
            x = x + skips[2 - number]
            name = f"decoders.{number}"
            if self.upsample:
                x = self.conv(np_doubled(x), f"{name}.conv2d")
            else:
                kind = f"{name}.transposed_conv2d"
                x = np_transposed(x, self.state[f"{kind}.weight"], self.state.get(f"{kind}.bias"))
            x = np.maximum(self.normed(x, f"{name}.norm_layer"), 0)
        return sigmoid(self.normed(self.conv(x + head, "pred.conv2d"), "pred.norm_layer"))


@pytest.mark.parametrize("options", [{}, {"norm": "none", "use_upsample_conv": True}, {"norm": "none"}])
def test_e2vid_loads_and_computes_as_described(tmp_path: Path, options: dict) -> None:
    file, state = e2vid_file(tmp_path / "w.pth.tar", base_num_channels=4, **options)
    network = load_e2vid(file).double()
    reference = [NumpyE2VID(state, bool(options.get("use_upsample_conv"))) for _ in range(2)]
    grids = torch.randn(3, 2, 5, 16, 24, generator=torch.Generator().manual_seed(1)).double()
    states = None
    for grid in grids:
        image, states = network(grid, states)
        expected = np.stack([one(own.numpy()) for one, own in zip(reference, grid)])
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-9)
    assert image.std() > 1e-3  # the images are of something
    fresh, _ = network(grids[-1])
    assert (fresh - image).abs().max() > 1e-4  # and of the windows before


def test_the_published_file_has_74_tensors_of_known_shapes(tmp_path: Path) -> None:
    file, state = e2vid_file(tmp_path / "w.pth.tar")
    assert len(state) == 74
    assert tuple(state["unetrecurrent.encoders.2.recurrent_block.Gates.weight"].shape) == (1024, 512, 3, 3)
    network = load_e2vid(file)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    own = network.state_dict()
    assert all(torch.equal(own[name.removeprefix("unetrecurrent.")], value) for name, value in state.items())
    assert sum(p.numel() for p in network.parameters()) == 10_712_098  # 10.71 M in the literature


def test_convlstm_step_and_residual_block_by_hand() -> None:
    torch.manual_seed(0)
    cell, block = ConvLSTM(3, 3).double(), ResidualBlock(3, norm=True).double().eval()
    block.bn1.running_mean.normal_()
    block.bn2.running_var.uniform_(0.5, 2)
    state = {f"x.{name}": value.detach() for name, value in cell.state_dict().items()}
    state |= {f"r{name}": value.detach() for name, value in block.state_dict().items()}
    reference = NumpyE2VID(state, upsample=False)
    x = torch.randn(2, 1, 3, 6, 5).double()
    step = None
    for own in x:
        step = cell(own, step)
        expected = reference.lstm(own[0].numpy(), "x", 0)
        np.testing.assert_allclose(step[0][0].detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(step[1][0].detach().numpy(), reference.memory[0][1], atol=1e-12)
    expected = reference.residual(x[0, 0].numpy(), "r")
    np.testing.assert_allclose(block(x[0]).detach().numpy()[0], expected, atol=1e-12)


def test_grids_are_normalised_on_their_nonzero_values() -> None:
    grid = torch.randn(3, 5, 8, 8).double() * (torch.rand(3, 5, 8, 8) < 0.2)
    grid[1] = 0
    grid[2] = torch.where(torch.rand(5, 8, 8) < 0.1, 2.5, 0.0)
    got = normalised(grid)
    values = grid[0][grid[0] != 0].numpy()
    expected = np.where(grid[0] != 0, (grid[0].numpy() - values.mean()) / values.std(), 0)
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1e-12)
    assert (got[1:] == 0).all()


def test_padding_is_undone_by_its_slices() -> None:
    for height, width in ((34, 34), (36, 41), (8, 16), (1, 9)):
        x = torch.rand(1, 2, height, width)
        larger, rows, cols = padded(x, 8)
        assert larger.shape[-2] % 8 == larger.shape[-1] % 8 == 0 and larger.shape[-1] - width < 8
        assert torch.equal(larger[..., rows, cols], x) and larger.sum() == pytest.approx(x.sum().item(), rel=1e-6)
    assert padded(torch.rand(1, 1, 34, 35), 8)[1:] == (slice(3, 37), slice(3, 38))


def test_contrast_is_stretched_between_percentiles() -> None:
    image = torch.rand(2, 1, 30, 20).double() * 0.1 + 0.4
    image[1] = 0.3
    low, high = np.percentile(image[0].numpy(), [0.5, 99.5])
    expected = np.clip((image[0].numpy() - low) / (high - low), 0, 1)
    np.testing.assert_allclose(stretched(image)[0].numpy(), expected, atol=1e-9)
    assert (stretched(image)[1] == 0.3).all()


def test_e2vid_source_goes_through_all_windows(tmp_path: Path) -> None:
    file, state = e2vid_file(tmp_path / "w.pth.tar", base_num_channels=4)
    batch = make_batch(18, 21)
    source = build_source(f"e2vid:{file}", data=DataConfig(windows=3))
    assert source.name == f"e2vid:{file}" and not source.needs_images
    images = source.images(batch)
    assert images.shape == (2, 3, 18, 21) and images.dtype == torch.float32
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    for row, grids in enumerate(voxels(batch).double().numpy()):
        network = NumpyE2VID(state, upsample=False)
        for grid in grids:
            some = grid != 0
            normal = np.where(some, (grid - grid[some].mean()) / grid[some].std(), 0)
            image = network(np.pad(normal, ((0, 0), (3, 3), (2, 1))))[0, 3:21, 2:23]
        low, high = np.percentile(image, [0.5, 99.5])
        np.testing.assert_allclose(images[row, 0].numpy(), np.clip((image - low) / (high - low), 0, 1), atol=2e-3)


# ---- files that are not what they should be --------------------------------------------------------------------


def test_missing_files_say_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth.*E2VID_lightweight.pth.tar.*rpg.ifi.uzh.ch"):
        build_source(f"e2vid:{tmp_path / 'nowhere.pth'}", data=DataConfig())


def test_a_key_too_many_or_too_few_is_a_table(tmp_path: Path) -> None:
    file, state = e2vid_file(tmp_path / "w.pth.tar", base_num_channels=4)
    state["unetrecurrent.head.extra"] = torch.zeros(2)
    del state["unetrecurrent.resblocks.1.conv2.weight"]
    state["unetrecurrent.head.conv2d.weight"] = torch.zeros(4, 3, 5, 5)
    torch.save({"arch": "E2VIDRecurrent", "model": {**PUBLIC, "base_num_channels": 4}, "state_dict": state}, file)
    with pytest.raises(ValueError, match="74 tensors: 1 missing, 1 unexpected, 1 other shape") as error:
        load_e2vid(file)
    assert "missing      resblocks.1.conv2.weight  (32, 32, 3, 3)" in str(error.value)
    assert "unexpected   head.extra  (2,)" in str(error.value)
    assert "head.conv2d.weight  (4, 3, 5, 5) where the network has (4, 5, 5, 5)" in str(error.value)


def test_tensors_without_the_prefix_of_another_network_are_refused(tmp_path: Path) -> None:
    file, state = e2vid_file(tmp_path / "w.pth.tar", base_num_channels=4)
    held = {"arch": "FireNet", "model": PUBLIC, "state_dict": state}
    torch.save(held, file)
    with pytest.raises(ValueError, match="arch is 'FireNet'"):
        load_e2vid(file)
    for name, value in (("recurrent_block_type", "convgru"), ("skip_type", "concat"), ("norm", "IN")):
        torch.save({**held, "arch": "E2VIDRecurrent", "model": {**PUBLIC, name: value}}, file)
        with pytest.raises(ValueError, match=f"model.{name}='{value}'"):
            load_e2vid(file)
    torch.save(state, file)
    with pytest.raises(ValueError, match="holds arch, model and state_dict"):
        load_e2vid(file)


class Stranger:
    """A class that a careless checkpoint holds."""


def test_pickled_objects_and_damage_are_refused_with_advice(tmp_path: Path) -> None:
    file, _ = e2vid_file(tmp_path / "w.pth.tar", base_num_channels=4)
    torch.save({"logger": Stranger(), "state_dict": {}}, file)
    with pytest.raises(ValueError, match=r"objects beside tensors \(.*Stranger\).*weights_only=False"):
        load_e2vid(file)
    file.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="w.pth.tar"):
        load_e2vid(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="w.pth.tar"):
        load_e2vid(file)
    whole, _ = e2vid_file(tmp_path / "whole.pth.tar", base_num_channels=4)
    file.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="w.pth.tar"):
        load_e2vid(file)
