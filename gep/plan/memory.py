"""Bytes that training holds: what autograd keeps between forward and backward, weights, gradients, moments.

Read off the modules' code (gep.models.layers, timm's and open_clip's blocks) for fp32 and for autocast: the residual
stream and the norms' inputs stay fp32, the products' inputs and outputs are bf16. tests/test_plan.py holds it against
what autograd really saves.
"""

from __future__ import annotations

from gep.plan.towers import BlockShape, Conv, Tower

FP32 = 4


def block_bytes(block: BlockShape, *, mixed: bool) -> float:
    """Bytes that autograd keeps of a block, a token."""
    size = 2 if mixed else FP32
    width, inner, hidden = block.width, block.attention, block.hidden
    branch = 4 * size if block.gated else 2 * size
    if block.rms:
        # Input, normalised and (cast) output of both norms; queries and keys in fp32 on their way to attention.
        norms = 2 * width * (2 * FP32 + size)
        queries = 2 * inner * (FP32 + size) + (2 * inner * FP32 if mixed else 0)
        small = FP32 * (2 + 3 * block.heads)
        return norms + queries + 4 * inner * size + branch * hidden + small
    norms = 2 * width * (FP32 + size)
    queries = 2 * inner * size if block.rotary else 0
    scales = 2 * width * size if block.scaled else 0
    small = FP32 * (4 + block.heads)
    return norms + queries + 4 * inner * size + scales + branch * hidden + small


def stem_bytes(convs: tuple[Conv, ...], in_elements: int, *, mixed: bool) -> float:
    """Bytes kept of the patch embedding, an image: its input, and of a stem each norm, activation and next input."""
    size = 2 if mixed else FP32
    return size * in_elements + sum(3 * size * conv.out_elements for conv in convs if conv.normed)


def tower_bytes(tower: Tower, *, mixed: bool, checkpointing: bool = False) -> float:
    """Bytes kept of a trained ViT, an image; with activation checkpointing the blocks' inputs and one block at work."""
    stem = stem_bytes(tower.convs, tower.in_elements, mixed=mixed)
    return stem + blocks_bytes(tower, mixed=mixed, checkpointing=checkpointing) + 2 * FP32 * tower.width * tower.length


def blocks_bytes(tower: Tower, *, mixed: bool, checkpointing: bool = False) -> float:
    """Bytes kept of all blocks, an image or sequence."""
    each = [block_bytes(block, mixed=mixed) for block in tower.blocks]
    if checkpointing and each:
        return tower.length * (max(each) + FP32 * sum(block.width for block in tower.blocks))
    return tower.length * sum(each)


def backbone_bytes(
    tower: Tower, token_dim: int, modalities: int, *, mixed: bool, heads: int, checkpointing: bool = False
) -> float:
    """Bytes kept of the backbone, a sequence.

    Args:
        tower: from `backbone_tower`.
        token_dim: features D of the tokens.
        modalities: kinds of frames.
        mixed: autocast.
        heads: how many of the two heads a loss reads.
        checkpointing: whether the blocks are run again in the backward pass.
    """
    size = 2 if mixed else FP32
    kept = blocks_bytes(tower, mixed=mixed, checkpointing=checkpointing)
    norm = tower.width * (2 * FP32 + (2 * size if mixed else size))
    ends = size * token_dim + norm + size * (modalities + 1) * token_dim
    return kept + tower.length * (ends + heads * 3 * FP32 * token_dim)


def mask_bytes(tower: Tower, *, mixed: bool) -> float:
    """Bytes kept of an attention mask, one a block in the products' precision; once a micro-batch without padding."""
    return len(tower.blocks) * (2 if mixed else FP32) * tower.length**2


def loss_bytes(kind: str, tokens: int, width: int) -> float:
    """Bytes kept of stage 1's regression, a window."""
    copies = {"mse": 1, "smooth_l1": 0, "cosine": 1, "mse_cosine": 2}[kind]
    return FP32 * tokens * width * copies


def similarity_bytes(tokens: int, width: int) -> float:
    """Bytes kept of the similarity-structure term, a window."""
    return FP32 * (2 * tokens * tokens + 2 * tokens * width)


def working_bytes(tower: Tower, *, mixed: bool, trained: bool) -> float:
    """Bytes of the tensors of the moment in the widest block, an image: gradients, or a frozen pass's."""
    size = 2 if mixed else FP32
    if not tower.blocks:
        return 0.0
    widest = max(tower.blocks, key=lambda block: block.hidden + block.width)
    inside = (2 if widest.gated else 1) * widest.hidden
    moment = size * (inside + widest.hidden) + 2 * FP32 * widest.width
    conv = max((2 * size * conv.out_elements for conv in tower.convs), default=0)
    return max(tower.length * moment, conv) if not trained else tower.length * moment


def state_bytes(
    trained: int, frozen: int, *, mixed: bool, ema: bool, shards: int = 1, largest_block: int = 0
) -> dict[str, float]:
    """Bytes a device holds of weights, gradients and AdamW's moments, by kind.

    Args:
        trained, frozen: numbers of parameters; all are stored in fp32, also under autocast.
        mixed: autocast keeps a bf16 copy of the trained matrices from forward to backward.
        ema: whether the weights' average is held.
        shards: devices that share the trained weights and what belongs to them (FSDP); 1 = each holds all (DDP).
        largest_block: parameters that FSDP gathers at a time, two of them at once.
    """
    gathered = 2 * largest_block * (2 if mixed else FP32) if shards > 1 else 0
    copies = 2 * trained if mixed and shards == 1 else 0
    return {
        "weights": FP32 * trained / shards + copies + gathered,
        "frozen weights": FP32 * frozen,
        "gradients": FP32 * trained / shards,
        "moments": 2 * FP32 * trained / shards,
        "average": FP32 * trained if ema else 0,
    }
