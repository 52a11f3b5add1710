"""What fit() costs beside a bare loop over the same module, batches and optimiser: `python bench/engine.py`.

Then what `gep.cpu`'s kernels, bf16 and the fused optimiser are worth in a step of the bare loop.

Both train a copy of one task in one process, in blocks taken in turn (fit, bare, fit, ...): a busy spell
hits both. fit logs every 10 steps and checks every step for NaN; the bare loop clips and steps, no more.
The batches come from memory: what is measured is the engine, not the loader.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import medians, print_header, print_table
from gep.accelerator import cpu_bf16, precision_of
from gep.cpu import use_fast_kernels
from gep.engine import TrainConfig, fit, make_accelerator
from gep.models.encoder import EventEncoder
from gep.models.presets import preset
from gep.optim import OptimConfig, lr_at, make_optimizer, param_groups

BLOCK = 10


class TokenRegression(nn.Module):
    """The encoder under a loss as cheap as any: mean squared error to fixed tokens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        chosen = preset(name)
        self.encoder = EventEncoder(chosen.arch, in_chans=2, img_size=chosen.img_size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens, _ = self.encoder(batch["x"])
        loss = F.mse_loss(tokens, batch["target"])
        return {"loss": loss, "token_rms": tokens.detach().square().mean().sqrt()}


def main(argv: list[str] | None = None) -> float:
    """Prints the table; returns the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="nano", help="encoder preset (nano)")
    parser.add_argument("--batch", type=int, default=64, help="samples per step (64)")
    parser.add_argument("--blocks", type=int, default=12, help=f"blocks of {BLOCK} steps of each kind (12)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"], help="fit's and the bare loop's (no)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    fit_times, bare_times = measure(options)
    ratio = statistics.median(fit_times) / statistics.median(bare_times)
    print_header("Engine overhead", packages=("torch", "accelerate", "timm"))
    rows = [
        [name, f"{1e3 * statistics.median(times):.2f}", f"{1e3 * min(times):.2f}", f"{1e3 * max(times):.2f}"]
        for name, times in (("fit", fit_times), ("bare loop", bare_times))
    ]
    print_table(["loop", "median [ms/step]", "min", "max"], rows)
    print(f"{options.preset}, batch {options.batch}, {options.blocks} blocks of {BLOCK} steps of each kind")
    print(f"**fit / bare loop = {ratio:.3f}** (target <= 1.05)\n")
    precisions(options)
    optimisers(options)
    return ratio


def precisions(options: argparse.Namespace) -> None:
    """Prints the stage-1 student's step in float32, with PyTorch's kernels and with `gep.cpu`'s, and in bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arms: dict[str, Callable[[], None]] = {}
    try:
        for name in ("fp32, PyTorch's kernels", "fp32", "bf16"):
            _kernels(fast=bool(arms))
            torch.manual_seed(0)
            task = TokenRegression(options.preset).to(device)
            loop = BareLoop(task, OptimConfig(lr=1e-5), 10 * BLOCK, "bf16" if name == "bf16" else "no")
            arms[name] = partial(_whole_step, loop, _batches(task, options.batch, device)[0], bool(arms))
        seconds = medians(arms, BLOCK)
    finally:
        _kernels(fast=True)
    flags = ", ".join(cpu_bf16()) or "neither AMX nor AVX512-BF16"
    rows = [[name, f"{1e3 * s:.2f}", f"{seconds['fp32'] / s:.2f}"] for name, s in seconds.items()]
    print_table(["precision", "median [ms/step]", "fp32 / this"], rows)
    print(f"bf16 in this CPU: {flags}; `train.precision=auto` is {precision_of('auto')} here\n")


def _kernels(*, fast: bool) -> None:
    """What `make_accelerator` chooses on this machine, or PyTorch's own choice."""
    torch.set_float32_matmul_precision("highest")
    timm.layers.set_fused_attn(True)
    if fast:
        use_fast_kernels()


def optimisers(options: argparse.Namespace) -> None:
    """Prints what an update of all parameters takes by each of AdamW's kernels."""
    cfg = OptimConfig(lr=1e-5)
    arms = {}
    for name, kind in {"fused": {}, "foreach": {"fused": False, "foreach": True}, "loop": {"fused": False}}.items():
        task = TokenRegression(options.preset).to("cuda" if torch.cuda.is_available() else "cpu")
        groups = param_groups(task, lr=cfg.lr, weight_decay=cfg.weight_decay)
        for parameter in task.parameters():
            parameter.grad = torch.ones_like(parameter)
        own = make_optimizer(groups, cfg)
        plain = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
        arms[name] = partial(_update, torch.optim.AdamW(plain, **kind) if kind else own)
    seconds = medians(arms, 2 * BLOCK)
    rows = [[name, f"{1e3 * s:.2f}", f"{s / seconds['fused']:.2f}"] for name, s in seconds.items()]
    print_table(["AdamW", "median [ms/update]", "this / fused"], rows)


def _whole_step(loop: "BareLoop", batch: dict[str, Tensor], fast: bool) -> None:
    _kernels(fast=fast)
    loop.step(batch)
    _now(batch["x"].device)


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    _now(optimizer.param_groups[0]["params"][0].device)


def measure(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds per step of each block of fit and of the bare loop; the first block of each warms up.

    fit's last block is not measured either: it asks for no further batch, evaluates and saves.
    """
    steps = BLOCK * (options.blocks + 2)
    train = TrainConfig(
        steps=steps, batch_size=options.batch, log_every=BLOCK, save_every=0, precision=options.precision
    )
    optim = OptimConfig(lr=1e-4, warmup_steps=BLOCK)
    fit_times: list[float] = []
    bare_times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(train, folder)
        task = TokenRegression(options.preset)
        device = accelerator.device
        batches = _batches(task, options.batch, device)
        bare = BareLoop(copy.deepcopy(task).to(device), optim, steps, options.precision)

        def in_turn(start: int) -> Iterator[list[dict[str, Tensor]]]:
            """fit asks for a batch when its step has ended: there the bare loop gets its turn."""
            for _ in range(options.blocks + 2):
                begin = _now(device)
                for step in range(BLOCK):
                    yield [batches[step % len(batches)]]
                fit_times.append((_now(device) - begin) / BLOCK)
                begin = _now(device)
                for step in range(BLOCK):
                    bare.step(batches[step % len(batches)])
                bare_times.append((_now(device) - begin) / BLOCK)

        fit(task, in_turn, train=train, optim=optim, accelerator=accelerator, run_dir=folder)
    return fit_times[1:], bare_times[1:]


class BareLoop:
    """Forward, backward, clip, step: what any loop has to do."""

    def __init__(self, task: nn.Module, optim: OptimConfig, steps: int, precision: str) -> None:
        self.task, self.optim, self.steps, self.done = task, optim, steps, 0
        self.device_type = next(task.parameters()).device.type
        self.bf16 = precision == "bf16"
        groups = param_groups(task, lr=optim.lr, weight_decay=optim.weight_decay)
        self.optimizer = make_optimizer(groups, optim)

    def step(self, batch: dict[str, Tensor]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.done, self.steps, self.optim)
        self.optimizer.zero_grad()
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            loss = self.task(batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.task.parameters(), self.optim.clip_norm)
        self.optimizer.step()
        self.done += 1


def _batches(task: TokenRegression, size: int, device: torch.device) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    height, width = task.encoder.config["img_size"]
    rows, columns = task.encoder.grid(height, width)
    found = []
    for _ in range(4):
        x = torch.randn(size, 2, height, width, generator=generator)
        target = torch.randn(size, rows * columns, task.encoder.embed_dim, generator=generator)
        found.append({"x": x.to(device), "target": target.to(device)})
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
