"""The teacher once: stage 1's sets read its tokens from disk, where they are put before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gep.data.image_stream import StillStream
from gep.data.mix import Mixed
from gep.data.paired import Recordings
from gep.data.sampler import SampleSource
from gep.data.token_cache_fill import attach
from gep.data.token_cache_write import Teacher
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM
from gep.models.teacher_cache import fingerprint

if TYPE_CHECKING:
    from stage1_align.task import Stage1Config


def answers(teacher: FrozenVFM, encoder: EventEncoder, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the teacher says of a batch: read from a cache with its samples, or asked of the model now.

    Args:
        teacher, encoder: of equal grids on the canvas.
        batch: `teacher_tokens` and `teacher_pooled`; or `image`, and `crop_at` where the events are crops of its view.
    Returns:
        tokens (B, N, D) at the places of the events' tokens, and vectors (B, P) of the whole images; float32.
    """
    if "teacher_tokens" in batch:
        return batch["teacher_tokens"].float(), batch["teacher_pooled"].float()
    tokens, pooled = teacher.features(batch["image"])
    if "crop_at" in batch:
        size = encoder.grid(batch["events"].height, batch["events"].width)
        tokens = crop_tokens(tokens, teacher.grid(*batch["image"].shape[-2:]), batch["crop_at"], size)
    return tokens, pooled


def crop_tokens(tokens: Tensor, grid: tuple[int, int], at: Tensor, size: tuple[int, int]) -> Tensor:
    """A box of each sample's tokens; nothing waits for the device.

    Args:
        tokens: (B, N, D) of a grid of N tokens, raster order.
        grid: its rows and columns.
        at: int64 (B, 2), the box's first row and column.
        size: its rows and columns.
    Returns:
        (B, n, D), raster order.
    """
    rows, columns = (torch.arange(count, device=at.device) for count in size)
    index = (at[:, :1] + rows)[:, :, None] * grid[1] + (at[:, 1:] + columns)[:, None]
    return tokens.gather(1, index.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1]))


def check_crops(encoder: EventEncoder, cfg: Stage1Config) -> None:
    """Raises ValueError where `augment.grid_crop` would not cut between the encoder's patches, naming the fix."""
    for name, source in cfg.data.sources().items():
        side = source.augment.grid_px
        if any(source.augment.grid_crop) and encoder.patch_size != (side, side):
            prefix = f"data.mix.{name}" if cfg.data.mix else "data"
            raise ValueError(
                f"{prefix}.augment.grid_px={side} is not the patch of encoder.preset={cfg.encoder.preset}: set it to "
                f"{encoder.patch_size[0]}, or {prefix}.augment.grid_crop=[0,0]"
            )


def _recordings(source: SampleSource | StillStream) -> Recordings:
    assert isinstance(source, Recordings)  # `check_cacheable` has refused the others
    return source


def attach_cache(
    cfg: Stage1Config,
    teacher: FrozenVFM,
    accelerator: Accelerator,
    train_set: SampleSource | StillStream,
    eval_set: SampleSource,
) -> None:
    """Lets both sets read the teacher's tokens from `teacher.cache`, making what is missing; on every rank.

    Raises:
        ValueError: see `gep.data.token_cache_fill.attach`.
    """

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():  # as in training, so that both say the same
            return teacher.features(images)

    trained: dict[str, SampleSource | StillStream] = {"training": train_set}
    if isinstance(train_set, Mixed):
        trained = {f"data.mix.{name}": source for name, source in zip(train_set.names, train_set.sources)}
    sources = {name: (_recordings(source), True) for name, source in trained.items()}
    attach(
        {**sources, "evaluation": (_recordings(eval_set), False)},
        cfg.teacher.cache,
        Teacher(
            features,
            key={**fingerprint(teacher), "pool": cfg.teacher.pool, "precision": accelerator.mixed_precision},
            grid=teacher.grid(cfg.data.height, cfg.data.width),
            token_dim=teacher.embed_dim,
            pooled_dim=teacher.pooled_dim,
        ),
        dtype=cfg.teacher.cache_dtype,
        batch_size=max(1, cfg.train.batch_size // accelerator.num_processes),
        num_workers=cfg.train.num_workers,
        say=accelerator.print,
        progress=cfg.train.progress,
    )
