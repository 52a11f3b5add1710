"""E2HQV on random weights in the published layout, against a second implementation in float64."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.llm_evrep.sources import build_source, e2hqv
from downstream.llm_evrep.sources.e2hqv import FILES, load_e2hqv
from downstream.llm_evrep.sources.windows import voxels
from gep.data.config import DataConfig
from tests.evrep_weights import Layout, make_batch


def double_conv(layout: Layout, name: str, inputs: int, out: int, last: int = 0) -> None:
    for place, channels in ((0, inputs), (3, out)):
        layout.weight(f"{name}.double_conv.{place}", out, channels, 3, 3)
        layout.norm(f"{name}.double_conv.{place + 1}", out)
    if last:
        layout.weight(f"{name}.double_conv.6", last, out, 1, 1)


def conv_norm(layout: Layout, name: str, inputs: int, out: int, kernel: int, groups: int = 1) -> None:
    layout.weight(f"{name}.convna.0", out, inputs // groups, kernel, kernel, bias=out)
    layout.norm(f"{name}.convna.1", out)


def mbconv(layout: Layout, name: str, inputs: int, out: int, fused: bool, expansion: int) -> None:
    wide, name = inputs * expansion, f"{name}.mbconv"
    conv_norm(layout, f"{name}.0", inputs, wide, 3 if fused else 1)
    if not fused:
        conv_norm(layout, f"{name}.1", wide, wide, 3, groups=wide)
    squeeze = 1 if fused else 2
    layout.weight(f"{name}.{squeeze}.excitation.0", wide // 12, wide)
    layout.weight(f"{name}.{squeeze}.excitation.2", wide, wide // 12)
    conv_norm(layout, f"{name}.{squeeze + 1}", wide, out, 1)


LEVELS = {0: (True, 1), 1: (True, 2), 2: (False, 4), 3: (False, 4)}  # fused, expansion


def unet(layout: Layout, name: str, inputs: int, width: int) -> None:
    double_conv(layout, f"{name}inc", inputs, width)
    for level, blocks in enumerate((2, 2, 4, 4)):
        sides = width * 2**level, width * 2 ** min(level + 1, 3)
        for block in range(blocks):
            mbconv(layout, f"{name}downs.{level}.mbd.mbconv_{block}", sides[block > 0], sides[1], *LEVELS[level])


def ups(layout: Layout, name: str, width: int) -> None:
    outs = {3: 4 * width, 2: 2 * width, 1: width, 0: width}
    for number, (level, blocks) in enumerate(((3, 6), (2, 4), (1, 4), (0, 2))):
        inputs = width * 2 ** (level + 1)
        for block in range(blocks):
            out = outs[level] if block == blocks - 1 else inputs
            mbconv(layout, f"{name}.{number}.mbd.mbconv_{block}", inputs, out, *LEVELS[level])


def e2hqv_folder(folder: Path) -> tuple[Path, dict[str, OrderedDict[str, Tensor]]]:
    """Three files as published, of random weights."""
    refe, tsem, mafg = Layout(1), Layout(2), Layout(3)
    double_conv(refe, "inc", 5, 5)
    widths = (5, 10, 20, 40)
    for level, kernel in enumerate((5, 3, 3)):
        inputs, out = widths[level], widths[level + 1]
        refe.weight(f"downs.{level}.mbd.Gates", 4 * out, inputs + out, kernel, kernel, bias=4 * out)
        double_conv(refe, f"downs.{level}.out", out, out)
    for number, (inputs, out) in enumerate(((60, 20), (30, 10), (15, 5))):
        refe.weight(f"ups.{number}.mbd.Gates", 4 * out, inputs + out, 3, 3, bias=4 * out)
        double_conv(refe, f"ups.{number}.out", out, out)
    double_conv(refe, "outc", 5, 1)
    tsem.state["embeds"] = torch.rand(1, 20, 180, 240, generator=tsem.generator)
    unet(tsem, "cnn.", 3, 3)
    ups(tsem, "cnn.ups", 3)
    double_conv(tsem, "cnn.out_clean_ie", 3, 3, last=1)
    unet(mafg, "", 8, 12)
    ups(mafg, "ups", 12)
    ups(mafg, "c_ups", 12)
    for sign in ("pos", "neg"):
        double_conv(mafg, f"out_clean_ie_{sign}", 12, 12, last=1)
        conv_norm(mafg, f"c_out_{sign}.matrix_c_conv.0", 12, 6, 1)
        conv_norm(mafg, f"c_out_{sign}.matrix_c_conv.1", 6, 1, 1)
    mafg.state["ce_to_f1.k"] = torch.tensor([0.17])
    folder.mkdir(exist_ok=True)
    states = {"refe": refe.state, "tsem": tsem.state, "mafg": mafg.state}
    for name, start in (("refe", "EffLstmcn"), ("tsem", "EffEmbedr"), ("mafg", "EffMultiWNet")):
        torch.save(states[name], folder / f"{start}_v1.0.0.pth")
    return folder, states


class FunctionalE2HQV:
    """The three networks as functions of the files' tensors, in float64."""

    def __init__(self, states: dict[str, OrderedDict[str, Tensor]], frame_run: int = 20, state_run: int = 40):
        self.frame_run, self.state_run = frame_run, state_run
        self.states = {key: {n: v.double() for n, v in state.items()} for key, state in states.items()}
        self.memory: dict[str, tuple[Tensor, Tensor]] = {}

    def select(self, network: str) -> None:
        self.p = self.states[network]

    def conv(self, x: Tensor, name: str, groups: int = 1) -> Tensor:
        weight = self.p[f"{name}.weight"]
        return F.conv2d(x, weight, self.p.get(f"{name}.bias"), padding=weight.shape[-1] // 2, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        var = ((x - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
        weight, bias = (self.p[f"{name}.{own}"][:, None, None] for own in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def double(self, x: Tensor, name: str) -> Tensor:
        for place in (0, 3):
            x = self.norm(self.conv(x, f"{name}.double_conv.{place}"), f"{name}.double_conv.{place + 1}")
            x = x * torch.sigmoid(x)
        last = f"{name}.double_conv.6"
        return self.conv(x, last) if f"{last}.weight" in self.p else x

    def conv_norm(self, x: Tensor, name: str, act: bool = True, groups: int = 1) -> Tensor:
        x = self.norm(self.conv(x, f"{name}.convna.0", groups), f"{name}.convna.1")
        return x * torch.sigmoid(x) if act else x

    def mbconv(self, x: Tensor, name: str) -> Tensor:
        name = f"{name}.mbconv"
        y, place = self.conv_norm(x, f"{name}.0"), 1
        if f"{name}.1.convna.0.weight" in self.p:
            y, place = self.conv_norm(y, f"{name}.1", groups=y.shape[1]), 2
        first, second = (self.p[f"{name}.{place}.excitation.{k}.weight"] for k in (0, 2))
        weights = torch.sigmoid((y.mean(dim=(2, 3)) @ first.T).clamp(min=0) @ second.T)
        y = self.conv_norm(y * weights[:, :, None, None], f"{name}.{place + 1}", act=False)
        return x + y if x.shape == y.shape else y

    def blocks(self, x: Tensor, name: str) -> Tensor:
        number = 0
        while f"{name}.mbd.mbconv_{number}.mbconv.0.convna.0.weight" in self.p:
            x = self.mbconv(x, f"{name}.mbd.mbconv_{number}")
            number += 1
        assert number
        return x

    @staticmethod
    def beside(x: Tensor, skip: Tensor, scale: int) -> Tensor:
        x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)
        room = torch.zeros(*x.shape[:2], *skip.shape[2:], dtype=x.dtype)
        top, left = ((skip.shape[k] - x.shape[k]) // 2 for k in (2, 3))
        room[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
        return torch.cat([skip, room], dim=1)

    def down(self, x: Tensor, name: str) -> list[Tensor]:
        maps = [self.double(x, f"{name}inc")]
        for level, pool in enumerate((3, 3, 2, 2)):
            maps.append(self.blocks(F.max_pool2d(maps[-1], pool), f"{name}downs.{level}"))
        return maps

    def up(self, maps: list[Tensor], name: str) -> Tensor:
        x = maps[4]
        for number, scale in enumerate((2, 2, 3, 3)):
            x = self.blocks(self.beside(x, maps[3 - number], scale), f"{name}.{number}")
        return x

    def lstm(self, x: Tensor, name: str) -> Tensor:
        size = self.p[f"{name}.mbd.Gates.weight"].shape[0] // 4
        zeros = torch.zeros(len(x), size, *x.shape[2:], dtype=x.dtype)
        hidden, cell = self.memory.get(name, (zeros, zeros))
        gates = self.conv(torch.cat([x, hidden], dim=1), f"{name}.mbd.Gates")
        i, f, o, g = (gates[:, k * size : (k + 1) * size] for k in range(4))
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        self.memory[name] = (hidden, cell)
        return self.double(hidden, f"{name}.out") + hidden

    def refe(self, grid: Tensor) -> Tensor:
        self.select("refe")
        maps = [self.double(grid, "inc")]
        for level, pool in enumerate((3, 3, 2)):
            maps.append(F.max_pool2d(self.lstm(maps[-1], f"downs.{level}"), pool))
        x = maps[3]
        for number, scale in enumerate((2, 2, 3)):
            x = self.lstm(self.beside(x, maps[2 - number], scale), f"ups.{number}")
        return self.double(x, "outc")

    def __call__(self, grids: Tensor) -> list[Tensor]:
        """The image after each window."""
        images = []
        for number, grid in enumerate(grids.unbind(1)):
            if number % self.frame_run == 0:
                image = torch.zeros_like(grid[:, :1])
            if number % self.state_run == 0:
                self.memory = {}
            features = self.refe(grid)
            self.select("tsem")
            embedding = self.p["embeds"][0, number % self.frame_run].expand(len(grid), 1, -1, -1)
            embedding = F.interpolate(embedding, size=grid.shape[2:], mode="bilinear")
            maps = self.down(torch.cat([image, features, embedding], dim=1), "cnn.")
            image = (image + self.double(self.up(maps, "cnn.ups"), "cnn.out_clean_ie")).clamp(0, 1)
            self.select("mafg")
            maps = self.down(torch.cat([image, embedding, grid, features], dim=1), "")
            events, thresholds = self.up(maps, "ups"), self.up(maps, "c_ups")
            terms = {}
            for sign in ("pos", "neg"):
                c = self.conv_norm(thresholds, f"c_out_{sign}.matrix_c_conv.0")
                c = self.conv_norm(c, f"c_out_{sign}.matrix_c_conv.1", act=False).clamp(min=0)
                terms[sign] = c * self.double(events, f"out_clean_ie_{sign}")
            k = self.p["ce_to_f1.k"]
            image = ((terms["pos"] - terms["neg"]).exp() * (image + k) - k).clamp(0, 1)
            images.append(image)
        return images


def test_e2hqv_loads_and_computes_as_described(tmp_path: Path) -> None:
    folder, states = e2hqv_folder(tmp_path / "e2hqv")
    network, reference = load_e2hqv(folder).double(), FunctionalE2HQV(states)
    grids = torch.randn(2, 3, 5, 38, 47, generator=torch.Generator().manual_seed(4)).double()
    got = network(grids)
    torch.testing.assert_close(got, reference(grids)[-1], rtol=0, atol=1e-9)
    assert got.shape == (2, 1, 38, 47) and got.std() > 0.01
    assert (network(grids[:, 1:]) - got).abs().max() > 1e-3  # what came before matters


def test_e2hqv_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (e2hqv.FRAME_RUN, e2hqv.STATE_RUN) == (20, 40)
    folder, states = e2hqv_folder(tmp_path / "e2hqv")
    network, reference = load_e2hqv(folder).double(), FunctionalE2HQV(states, frame_run=2, state_run=4)
    monkeypatch.setattr(e2hqv, "FRAME_RUN", 2)
    monkeypatch.setattr(e2hqv, "STATE_RUN", 4)
    grids = torch.randn(1, 5, 5, 36, 36, generator=torch.Generator().manual_seed(4)).double()
    expected, last = reference(grids), network(grids)
    torch.testing.assert_close(network(grids[:, :3]), expected[2], rtol=0, atol=1e-8)
    torch.testing.assert_close(last, expected[4], rtol=0, atol=1e-8)
    torch.testing.assert_close(last, network(grids[:, 4:]), rtol=0, atol=0)


def test_e2hqv_source_takes_small_views(tmp_path: Path) -> None:
    folder, states = e2hqv_folder(tmp_path / "e2hqv")
    batch = make_batch(34, 39)
    source = build_source(f"e2hqv:{folder}", data=DataConfig(windows=3))
    images = source.images(batch)
    assert images.shape == (2, 3, 34, 39) and images.dtype == torch.float32 and not images.requires_grad
    grids = F.pad(voxels(batch).double(), (0, 0, 1, 1))
    expected = FunctionalE2HQV(states)(grids)[-1][..., 1:35, :].expand(-1, 3, -1, -1)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-3)
    one_file = build_source(f"e2hqv:{folder / 'EffEmbedr_v1.0.0.pth'}", data=DataConfig(windows=3))
    assert torch.equal(one_file.images(batch), images)


def test_a_missing_file_says_what_to_download(tmp_path: Path) -> None:
    folder, _ = e2hqv_folder(tmp_path / "e2hqv")
    (folder / "EffEmbedr_v1.0.0.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"EffEmbedr_v\*.pth.*github.com/VincentQQu/E2HQV"):
        load_e2hqv(folder)
    with pytest.raises(FileNotFoundError, match="EffLstmcn"):
        load_e2hqv(tmp_path / "nowhere")


def test_tensors_of_another_network_are_a_table(tmp_path: Path) -> None:
    folder, states = e2hqv_folder(tmp_path / "e2hqv")
    torch.save(states["mafg"], folder / "EffLstmcn_v1.0.0.pth")
    with pytest.raises(ValueError, match=r"EffLstmcn_v1.0.0.pth does not fit REFE .*\n(.*\n)+  … and \d+ more"):
        load_e2hqv(folder)
    assert set(FILES) == {"refe", "tsem", "mafg"}


def test_two_versions_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder, states = e2hqv_folder(tmp_path / "e2hqv")
    torch.save(states["mafg"], folder / "EffMultiWNet_v1.1.0.pth")
    with pytest.raises(ValueError, match="2 versions of EffMultiWNet"):
        load_e2hqv(folder)
