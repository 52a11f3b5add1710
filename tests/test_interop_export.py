"""Exports for other runtimes: read back, they are PyTorch's numbers, at other batches and sizes too."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from dense_fixtures import write_exports
from torch import nn

from downstream.dense.features import DenseFeatures
from downstream.dense.heads import build_head
from downstream.dense.model import DenseModel
from downstream.llm_evrep.generator import build_generator
from downstream.llm_evrep.model import EvRep
from gep.cli import main
from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.interop import runtimes
from gep.interop.graphs import Graph, graph_of
from gep.models import EventEncoder

try:
    import onnxruntime
    import onnxscript  # noqa: F401
except ImportError:
    onnxruntime = None
NEEDED = pytest.mark.skipif(onnxruntime is None, reason="needs the extra export")
FORMATS = [pytest.param("onnx", marks=NEEDED), "torchscript", "exported-program"]
SLOW = [
    pytest.param("onnx", marks=[NEEDED, pytest.mark.slow]),
    "torchscript",
    pytest.param("exported-program", marks=pytest.mark.slow),
]
INPUT = {"height": 36, "width": 36, "fit": "pad", "windows": 1, "window_us": 50_000, "num_events": 0}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return write_exports(tmp_path_factory.mktemp("exports"))


def dense(export, head: str, use_backbone: bool) -> DenseModel:
    torch.manual_seed(0)
    features = DenseFeatures(GEPModel.from_pretrained(export), use_backbone=use_backbone, num_levels=2)
    settings = {**INPUT, "height": 40, "width": 34, "windows": 2 if use_backbone else 1}
    built = build_head(head, features.channels, 5, width=16)
    return DenseModel(features, built, kind="segmentation", input_settings=settings, task={}).eval()


def replay(path, format: str, inputs: tuple[torch.Tensor, ...], outputs: list[str]) -> list[torch.Tensor]:
    """The file run by the runtime alone."""
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(out) for out in session.run(outputs, fed)]
    loaded = torch.jit.load(str(path)) if format == "torchscript" else torch.export.load(path).module()
    out = loaded(*inputs)
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize("format", SLOW)
def test_encoder_by_the_command(tmp_path, exports, format, capsys):
    out = tmp_path / "encoder.pt2"
    main(["export", str(exports["stage1"]), str(out), "--format", format])
    printed = capsys.readouterr().out
    assert "any batch, any size" in printed and printed.count("largest difference at") == 5
    model = GEPModel.from_pretrained(exports["stage1"])
    x = torch.rand(5, 2, 54, 30)
    with torch.no_grad():
        want = model.encoder(x)
    for got, wanted in zip(replay(out, format, (x,), ["tokens", "pooled"]), want, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt2"]


@pytest.mark.parametrize("format", SLOW)
def test_dense_head_with_a_backbone(tmp_path, exports, format):
    model = dense(exports["stage2"], "linear", use_backbone=True)
    graph = graph_of(model, "dense")
    assert graph.inputs == ("frames", "t_us") and graph.size == (42, 36) and graph.lead == (2, 2)
    written = runtimes.write(graph, tmp_path / "m.pt2", format)
    frames, t_us = graph.example(3, graph.size, seed=9)
    with torch.no_grad():
        want = model.predict_frames(frames, t_us)
    (got,) = replay(tmp_path / "m.pt2", format, (frames, t_us), ["output"])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert max(written.differences.values()) < 2e-5 and want.std() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "dpt"])
@pytest.mark.parametrize("format", FORMATS)
def test_dense_heads_without_a_backbone(tmp_path, exports, head, format):
    graph = graph_of(dense(exports["stage1"], head, use_backbone=False), "dense", (36, 36))
    written = runtimes.write(graph, tmp_path / "m.pt2", format)
    assert max(written.differences.values()) < 1e-4
    # At 36x36 the coarsest map has as many cells as UPerNet's pyramid, which torch.export takes for another graph.
    fixed = head == "upernet" and format != "torchscript"
    assert written.dynamic_size != fixed and bool(written.reason) == fixed


@pytest.mark.parametrize("format", FORMATS)
def test_generator_of_llm_evrep(tmp_path, format):
    torch.manual_seed(0)
    model = EvRep(Histogram(), build_generator("nano", in_chans=2), input_settings=INPUT)
    with torch.no_grad():
        nn.init.normal_(model.generator.to_image.conv.weight)
    graph = graph_of(model.eval(), "llm_evrep")
    written = runtimes.write(graph, tmp_path / "m.pt2", format)
    frames = torch.rand(2, 2, 44, 60)
    (got,) = replay(tmp_path / "m.pt2", format, (frames,), ["image"])
    assert written.dynamic_size
    with torch.no_grad():
        torch.testing.assert_close(got, model.images(frames), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arch, size",
    [
        ("vit_tiny_patch16_224", (48, 32)),
        pytest.param("vit_small_patch16_dinov3", (32, 48), marks=pytest.mark.slow),
    ],
)
def test_timm_vits_by_torchscript_take_other_sizes(tmp_path, arch, size):
    torch.manual_seed(0)
    encoder = EventEncoder(arch, 2, size)
    settings = SimpleNamespace(**{**INPUT, "height": size[0], "width": size[1]})
    model = GEPModel.from_parts(encoder, Histogram(), settings).eval()
    if encoder.vit.pos_embed is not None:
        nn.init.normal_(encoder.vit.pos_embed)
    written = runtimes.write(graph_of(model, "gep"), tmp_path / "m.pt2", "torchscript")
    assert written.dynamic_size and max(written.differences.values()) < 2e-5


class _Fixed(nn.Module):
    """Takes one size alone; `twice` makes the traced graph wrong for other batches."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        if self.twice and frames.shape[0] == 3:
            frames = 2 * frames
        return frames.reshape(-1, 2 * 8 * 8) @ torch.ones(128, 2)


@pytest.mark.parametrize("format", ["torchscript", "exported-program"])
def test_a_size_that_cannot_be_dynamic_is_said(tmp_path, format):
    graph = Graph(_Fixed(False), ("frames",), ("out",), (2,), (2, 2), (8, 8))
    written = runtimes.write(graph, tmp_path / "m.pt2", format)
    assert not written.dynamic_size and "this size only (a dynamic size failed" in str(written)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_a_file_that_differs_is_not_written(tmp_path):
    (tmp_path / "m.pt2").write_text("before")
    graph = Graph(_Fixed(True), ("frames",), ("out",), (2,), (2, 2), (8, 8))
    with pytest.raises(ValueError, match="torchscript of this model failed: out of frames .3, 2, 8, 8. differs"):
        runtimes.write(graph, tmp_path / "m.pt2", "torchscript", dynamic_size=False)
    assert (tmp_path / "m.pt2").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_wrong_settings_are_named(tmp_path, exports, monkeypatch, capsys):
    model = GEPModel.from_pretrained(exports["stage1"])
    with pytest.raises(ValueError, match="size 40x36 is no multiple of 6x6"):
        graph_of(model, "gep", (40, 36))
    with pytest.raises(ValueError, match="choose one of onnx, torchscript, exported-program"):
        runtimes.write(graph_of(model, "gep"), tmp_path / "m", "tflite")
    with pytest.raises(ValueError, match="end in .pt2: name it m.pt2"):
        runtimes.write(graph_of(model, "gep"), tmp_path / "m.bin", "exported-program")
    monkeypatch.setattr(runtimes, "_there", lambda name: name != "onnxruntime")
    with pytest.raises(ValueError, match=r"needs onnxruntime: pip install 'gep\[export\]'"):
        runtimes.write(graph_of(model, "gep"), tmp_path / "m", "onnx")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), str(tmp_path / "m"), "--format", "torchscript"])
    assert "is not of a gep export" in capsys.readouterr().err


def test_the_command_line_imports_no_model_before_it_is_asked():
    code = "import sys, gep.cli; assert not {'timm', 'open_clip', 'onnx', 'gep.hub', 'downstream'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
