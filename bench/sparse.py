"""What a stage-1 step of the student costs where patches are left out: `python bench/sparse.py`.

Forward, losses, backward, clipping and optimiser of the stage-1 task, dense and sparse in turn in one process. The
teacher's tokens come from memory: what is measured is the student. Windows have events in a part of their patches.
"""

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import medians, print_header, print_table
from gep.models.encoder import EventEncoder
from gep.models.presets import preset
from gep.optim import OptimConfig, make_optimizer, param_groups
from stage1_align.task import AlignLossConfig, Stage1Task

TARGETS = {"0.5": 0.58, "0.25": 0.33}
"""Asked of `small` at 224 x 224, over the dense step."""


class Step:
    """One training step of a student on a fixed batch."""

    def __init__(self, arch: str, size: tuple[int, int], keep: float | str, batch: dict, teacher: SimpleNamespace):
        torch.manual_seed(0)
        encoder = EventEncoder(arch, 2, size, head_dim=teacher.pooled.shape[1], keep=keep)
        self.task = Stage1Task(encoder, teacher, nn.Identity(), AlignLossConfig()).to(batch["events"].device)
        optim = OptimConfig()
        groups = param_groups(self.task, lr=1e-5, weight_decay=optim.weight_decay)
        self.optimizer = make_optimizer(groups, optim)
        self.clip, self.batch = optim.clip_norm, batch

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.task(self.batch)["loss"].backward()
        nn.utils.clip_grad_norm_(self.task.parameters(), self.clip)
        self.optimizer.step()
        if self.batch["events"].is_cuda:
            torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints the tables; returns each row's ratio to dense, by "preset keep"."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["small", "nano"], help="encoder presets (small nano)")
    parser.add_argument("--keep", nargs="+", default=["1", "0.5", "0.25", "active"], help="1 first (1 0.5 0.25 active)")
    parser.add_argument("--batch", type=int, default=4, help="windows a step of a 224 x 224 preset; nano has 16 x (4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in turn (5)")
    parser.add_argument("--filled", type=float, default=0.35, help="share of patches with events (0.35)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print_header("Sparse encoding: the student's stage-1 step", packages=("torch", "timm"))
    ratios: dict[str, float] = {}
    for name in options.presets:
        ratios |= _preset(name, options)
    return ratios


def _preset(name: str, options: argparse.Namespace) -> dict[str, float]:
    chosen = preset(name)
    size = chosen.img_size
    batch = options.batch * (16 if name == "nano" else 1)
    shape = EventEncoder(chosen.arch, 2, size)
    rows, columns = shape.grid(*size)
    frames = _windows(batch, size, shape.patch_size, options.filled).to(options.device)
    teacher = _teacher(batch, rows * columns, shape.embed_dim, options.device)
    data = {"events": frames, "windows": 1, "image": torch.zeros(1)}
    keeps = [value if value == "active" else float(value) for value in options.keep]
    steps = {str(keep): Step(chosen.arch, size, keep, data, teacher) for keep in keeps}
    seconds = medians(steps, options.rounds)
    dense = seconds[str(keeps[0])]
    print(
        f"`{name}` at {size[0]} x {size[1]}: {rows * columns} patches and {shape.num_prefix} further tokens, "
        f"{batch} windows a step, events in {options.filled:.0%} of the patches, {options.rounds} rounds in turn\n"
    )
    table, found = [], {}
    for keep in keeps:
        ratio = seconds[str(keep)] / dense
        asked = TARGETS.get(str(keep), 0.0) if name == "small" else 0.0
        count = options.filled if keep == "active" else keep
        kept = f"{math.ceil(count * rows * columns - 1e-9)}{' on average' if keep == 'active' else ''}"
        table.append(
            [str(keep), kept, f"{1e3 * seconds[str(keep)]:.0f}", f"{ratio:.3f}", f"<= {asked}" if asked else ""]
        )
        found[f"{name} {keep}"] = ratio
    print_table(["keep", "patches", "median [ms/step]", "ratio to the first", "asked"], table)
    return found


def _windows(batch: int, size: tuple[int, int], patch: tuple[int, int], filled: float) -> Tensor:
    """(B, 2, H, W) counts with events in about a share `filled` of the patches."""
    generator = torch.Generator().manual_seed(0)
    grid = (size[0] // patch[0], size[1] // patch[1])
    here = torch.rand(batch, 1, *grid, generator=generator) < filled
    here = here.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    return torch.poisson(torch.full((batch, 2, *size), 0.3), generator=generator) * here


def _teacher(batch: int, tokens: int, dim: int, device: str) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, tokens, dim, generator=generator).to(device)
    pooled = features.mean(dim=1)
    return SimpleNamespace(features=lambda image: (features, pooled), pooled=pooled)


if __name__ == "__main__":
    main()
