"""A model as ONNX, TorchScript or an exported program: written, read back, and compared with PyTorch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gep.interop.graphs import Graph

Format = Literal["onnx", "torchscript", "exported-program"]
FORMATS: tuple[str, ...] = get_args(Format)
Run = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]
TOLERANCE = 1e-3
"""Largest difference from PyTorch, as a share of the largest output (at least 1), that a written file may show."""
_LONGEST = 4096  # upper end of a dynamic batch and of a dynamic size in units


@dataclass(frozen=True)
class Written:
    """A written file and how it compares with PyTorch."""

    path: Path
    """The file."""
    dynamic_size: bool
    """Whether it takes other sizes; it takes any batch."""
    differences: dict[str, float]
    """Largest absolute difference from PyTorch on random input, by the input's shape."""
    reason: str
    """Why the size is fixed although it was not asked to be."""

    def __str__(self) -> str:
        size = "any size" if self.dynamic_size else "this size only"
        lines = [f"{self.path}: any batch, {size}" + (f" ({self.reason})" if self.reason else "")]
        return "\n".join([*lines, *(f"largest difference at {at}: {off:.2g}" for at, off in self.differences.items())])


def write(graph: Graph, out: str | os.PathLike[str], format: Format, *, dynamic_size: bool = True) -> Written:
    """Write a graph for another runtime, read it back and compare it with PyTorch on random input.

    Args:
        graph: of `graph_of`.
        out: the file; one that is there is replaced once the new one has been found right.
        format: "onnx" (extra `export`), "torchscript" (traced) or "exported-program" (torch.export).
        dynamic_size: False = the graph's size alone; True = any, where the format manages that for this model.
    Returns:
        What was written, with the differences.
    Raises:
        ValueError: an unknown format, a library that is missing, or a file that differs from PyTorch.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    if format == "onnx" and (missing := [n for n in ("onnx", "onnxscript", "onnxruntime") if not _there(n)]):
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install 'gep[export]'")
    path = Path(out).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file to write")
    if format == "exported-program" and path.suffix != ".pt2":
        raise ValueError(f"{path}: torch.export loads files that end in .pt2: name it {path.stem}.pt2")
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    for dynamic in (True, False) if dynamic_size else (False,):
        # Weights too large for one file lie beside it, by a name that the file holds: so all are written elsewhere.
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
        try:
            run = _WRITERS[format](graph, folder / path.name, dynamic)
            differences = compare(graph, run, dynamic)
            for file in sorted(folder.iterdir(), reverse=True):
                os.replace(file, path.parent / file.name)
            return Written(path, dynamic, differences, reason)
        except Exception as error:  # tracers, runtimes and guards share no base class
            cause = " ".join(str(error).split())[:200] or type(error).__name__
            if not dynamic:
                raise ValueError(f"{format} of this model failed: {cause}") from error
            reason = f"a dynamic size failed: {cause}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError("unreachable")


def compare(graph: Graph, run: Run, dynamic: bool) -> dict[str, float]:
    """Largest absolute difference between a written file and PyTorch, by shape of the frames.

    Raises:
        ValueError: shapes differ, or the difference is beyond TOLERANCE.
    """
    height, width = graph.size
    shapes = [(2, graph.size), (1, graph.size), (3, graph.size)]
    if dynamic:
        rows, columns = graph.unit
        shapes += [(2, (height + 2 * rows, width + columns)), (1, (height + rows, width + 3 * columns))]
    found = {}
    for seed, (batch, size) in enumerate(shapes):
        inputs = graph.example(batch, size, seed)
        with torch.no_grad():
            wanted = _several(graph.module(*inputs))
        got = run(inputs)
        worst = 0.0
        for name, one, two in zip(graph.outputs, got, wanted, strict=True):
            if one.shape != two.shape:
                raise ValueError(f"{name} has shape {tuple(one.shape)} instead of {tuple(two.shape)}")
            off = (one - two).abs().max().item()
            if not off <= TOLERANCE * max(1.0, two.abs().max().item()):
                raise ValueError(f"{name} of frames {tuple(inputs[0].shape)} differs from PyTorch by {off:.3g}")
            worst = max(worst, off)
        found["x".join(map(str, inputs[0].shape))] = worst
    return found


def _torchscript(graph: Graph, path: Path, dynamic: bool) -> Run:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph.module, graph.example(2, _traced_size(graph, dynamic)), check_trace=False)
        torch.jit.save(traced, str(path))
        loaded = torch.jit.load(str(path))
    return lambda inputs: _several(_quiet(loaded, inputs))


def _program(graph: Graph, dynamic: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=_LONGEST)
    dims: dict[int, Any] = {0: batch}
    if dynamic:
        for axis, name, unit in ((-2, "rows", graph.unit[0]), (-1, "columns", graph.unit[1])):
            dims[len(graph.lead) + 3 + axis] = unit * torch.export.Dim(name, min=2, max=_LONGEST)
    shapes = {"frames": dims, "t_us": {0: batch}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(
            graph.module,
            graph.example(2, _traced_size(graph, dynamic)),
            dynamic_shapes={name: shapes[name] for name in graph.inputs},
        )


def _traced_size(graph: Graph, dynamic: bool) -> tuple[int, int]:
    """The graph's own size; for a dynamic one, a size at which no resampling is left out as having nothing to do.

    That is not the size of the positions, nor one whose coarser maps are those of a pooling pyramid.
    """
    if not dynamic:
        return graph.size
    rows, columns = (side // step for side, step in zip(graph.size, graph.unit, strict=True))
    return max(rows + 1, 15) * graph.unit[0], max(columns + 2, 17) * graph.unit[1]


def _exported_program(graph: Graph, path: Path, dynamic: bool) -> Run:
    torch.export.save(_program(graph, dynamic), path)
    loaded = torch.export.load(path).module()
    return lambda inputs: _several(_quiet(loaded, inputs))


def _onnx(graph: Graph, path: Path, dynamic: bool) -> Run:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _program(graph, dynamic),
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
        assert program is not None  # it is one by dynamo
        program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        fed = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(list(graph.outputs), fed)]

    return run


_WRITERS: dict[str, Callable[[Graph, Path, bool], Run]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "exported-program": _exported_program,
}


def _quiet(module: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return module(*inputs)


def _several(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
