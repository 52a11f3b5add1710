"""The image generator of LLM-EvRep beside the event encoder: images a second, peak memory, and what bf16 costs.

    python bench/evrep.py --preset small --size 224 --batch 8

Both read the same tensors in one process, in turns, so that a busy spell hits both: compare ratios. The encoder is the
ViT of the preset of the same name. Peak memory is that of a pass beyond what the weights take: of the allocator on a
GPU, of the process's resident pages on a CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":  # run as a file: the checkout's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import medians, print_header, print_table
from downstream.llm_evrep.generator import PRESETS, build_generator
from gep.models import EventEncoder
from gep.models.presets import preset

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main(argv: list[str] | None = None) -> float:
    """Prints the tables; returns generator / encoder, images a second of the fp32 forward."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=tuple(PRESETS), help="of generator and encoder")
    parser.add_argument("--size", type=int, default=224, help="rows and columns of the input")
    parser.add_argument("--batch", type=int, default=2, help="images a pass")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of which the median is taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    models = build(options.preset, options.size, options.device)
    shape = (options.batch, 3, options.size, options.size)
    # Mostly black, as events are.
    frames = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    frames = (frames * (frames > 0.8)).to(options.device)

    print_header("LLM-EvRep generator", packages=("torch", "timm"))
    ratio = speeds(models, frames, options.repeats)
    mean, largest, contrast = bf16_deviation(models["generator"], frames)
    print(
        f"bf16 against fp32 images: mean |difference| {255 * mean:.2f}, largest {255 * largest:.1f} of 255 grey levels "
        f"(standard deviation of the images: {255 * contrast:.0f})\n"
    )
    print(f"**generator / encoder = {ratio:.2f}** images a second, fp32 forward, {options.size}x{options.size}")
    return ratio


def build(name: str, size: int, device: str) -> dict[str, nn.Module]:
    """Generator and encoder of a preset with random weights; the generator's images have contrast."""
    torch.manual_seed(0)
    generator = build_generator(name, in_chans=3)
    nn.init.normal_(generator.to_image.conv.weight, std=0.3)
    chosen = preset(name)
    encoder = EventEncoder(chosen.arch, in_chans=3, img_size=chosen.img_size)
    return {"generator": generator.to(device).eval(), "encoder": encoder.to(device).eval()}


def speeds(models: dict[str, nn.Module], frames: Tensor, repeats: int) -> float:
    """Prints the table of forward passes and training steps; returns generator / encoder of the fp32 forward."""
    rows, seconds = [], {}
    for precision in ("fp32", "bf16"):
        for kind, run in (("forward", forward), ("forward + backward", train)):
            passes: dict[str, Callable[[], None]] = {
                name: lambda model=model, run=run, precision=precision: run(model, frames, precision)
                for name, model in models.items()
            }
            found = medians(passes, repeats)
            for name, one in passes.items():
                seconds[name, kind, precision] = found[name]
                rate = f"{len(frames) / found[name]:.2f}"
                rows.append([name, kind, precision, f"{1e3 * found[name]:.0f}", rate, f"{peak_mib(one, frames):.0f}"])
    print_table(["network", "pass", "precision", "ms", "images/s", "peak MiB"], rows)
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M" for name, model in models.items()
    )
    print(f"parameters: {sizes}; batch {len(frames)}, {frames.shape[-2]}x{frames.shape[-1]}\n")
    return seconds["encoder", "forward", "fp32"] / seconds["generator", "forward", "fp32"]


@torch.no_grad()
def forward(model: nn.Module, frames: Tensor, precision: str) -> Tensor:
    """Images of a generator, tokens of an encoder."""
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = model(frames)
    return finished(output[0] if isinstance(output, tuple) else output)


def train(model: nn.Module, frames: Tensor, precision: str) -> None:
    """A forward and a backward pass; the gradients must be finite."""
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = model(frames)
    output = output[0] if isinstance(output, tuple) else output
    output.float().square().mean().backward()
    finite = all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)
    assert finite, f"{type(model).__name__}: a gradient in {precision} is not finite"
    model.zero_grad(set_to_none=True)
    finished(output)


def finished(output: Tensor) -> Tensor:
    """Waits for a GPU."""
    if output.is_cuda:
        torch.cuda.synchronize()
    return output


def peak_mib(one: Callable[[], object], frames: Tensor) -> float:
    """Memory that a pass takes beyond what was taken before it [MiB]; NaN where the system does not say."""
    gc.collect()
    if frames.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # What the C library keeps of earlier passes would hide this one.
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")  # the peak begins anew at what is resident now
        before = resident("VmRSS")
        one()
        return (resident("VmHWM") - before) / 2**10
    except (OSError, AttributeError):
        return float("nan")


def resident(field: str) -> int:
    """A field of /proc/self/status [KiB]."""
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field))


def bf16_deviation(generator: nn.Module, frames: Tensor) -> tuple[float, float, float]:
    """(mean, largest |difference| of bf16 and fp32 images, standard deviation of the fp32 ones), of 1."""
    exact, rounded = (forward(generator, frames, precision) for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32 and torch.isfinite(rounded).all()
    apart = (exact - rounded).abs()
    return apart.mean().item(), apart.max().item(), exact.std().item()


if __name__ == "__main__":
    main()
