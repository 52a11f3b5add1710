"""Imports: the same tokens as the foreign layout's own forward, and every tensor of the file accounted for."""

from __future__ import annotations

import pytest
import timm
import torch
from interop_layouts import clip_forward, clip_state, dinov2_forward, dinov2_state, dinov3_forward, dinov3_state
from safetensors.torch import save_file
from test_hub import recording
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

from gep.cli import main
from gep.hub import GEPModel
from gep.interop import dinov2
from gep.interop.encoder import import_encoder
from gep.interop.table import Conversion
from gep.models import EventEncoder

CLOSE = 1e-5


def frames(chans: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(2, chans, height, width, generator=torch.Generator().manual_seed(7))


def tokens_of(model: GEPModel, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.encoder(x)[0].double()


def largest(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and want.std() > 0.5  # a norm's output; not all alike
    return (got - want).abs().max().item()


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [None, (98, 56)])
def test_dinov2_gives_the_tokens_of_its_own_forward(tmp_path, registers, size):
    state = dinov2_state(registers=registers)
    torch.save(state, tmp_path / "w.pth")
    model = import_encoder(tmp_path / "w.pth", "dinov2", size=size, normalise="none").model
    model.save_pretrained(tmp_path / "m")
    model = GEPModel.from_pretrained(tmp_path / "m")
    assert model.encoder.config["arch"] == f"vit_small_patch14_{'reg4_' * bool(registers)}dinov2"
    x = frames(3, *(size or (70, 70)))
    assert largest(tokens_of(model, x), dinov2_forward(state, x)[:, 1:]) < CLOSE
    with torch.no_grad():  # the class token too
        cls = model.encoder.vit.forward_features(x)[:, 0].double()
    assert largest(cls, dinov2_forward(state, x)[:, 0]) < CLOSE
    assert model.encode(recording(size=60)).tokens.shape == (1, 1, x.shape[-2] * x.shape[-1] // 196, 384)


def test_a_wrong_weight_would_be_seen(tmp_path):
    """The tolerance of these tests is far below what one exchanged tensor does."""
    state = dinov2_state()
    x = frames(3, 70, 70)
    right = dinov2_forward(state, x)
    for name in ("blocks.11.ls1.gamma", "blocks.0.norm1.bias", "blocks.5.mlp.fc1.bias", "pos_embed", "cls_token"):
        wrong = dict(state, **{name: state[name].flip(-1)})
        assert (dinov2_forward(wrong, x)[:, 1:] - right[:, 1:]).abs().max() > 100 * CLOSE


def test_giant_gated_mlps_by_the_same_rule(monkeypatch):
    monkeypatch.setattr(dinov2, "_SIZES", {(128, 3): "giant"})
    state = dinov2_state(width=128, depth=3, registers=4, gated=88)
    weights = Conversion(dict(state))
    assert dinov2.convert(weights, None) == ("vit_giant_patch14_reg4_dinov2", (70, 70))
    shape = {"img_size": 70, "patch_size": 14, "embed_dim": 128, "depth": 3, "num_heads": 2, "num_classes": 0}
    vit = VisionTransformer(
        **shape, mlp_ratio=176 / 128, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU, init_values=1.0,
        reg_tokens=4, no_embed_class=True,
    ).eval()  # fmt: skip
    vit.load_state_dict(weights.tensors)
    x = frames(3, 70, 70)
    with torch.no_grad():
        got = vit.forward_features(x)[:, 5:].double()
    assert largest(got, dinov2_forward(state, x)[:, 1:]) < CLOSE


@pytest.mark.parametrize("chans", [pytest.param(3, marks=pytest.mark.slow), 20])
def test_gep_release_under_event_encoder(tmp_path, chans):
    state = dinov2_state(chans=chans, prefix="event_encoder.", chunk=chans == 20)
    torch.save({"model": state, "epoch": 3, "optimizer": {}}, tmp_path / "gep.pth")
    imported = import_encoder(tmp_path / "gep.pth", "gep")
    model = imported.model
    assert model.encoder.in_chans == chans and model.input_settings["height"] == 224
    assert type(model.represent).__name__ == {3: "EventImage", 20: "VoxelGrid"}[chans]
    assert "epoch, optimizer" in imported.table and "assumed" in imported.notes[0]
    x = frames(chans, 224, 224)
    plain = {name.removeprefix("event_encoder."): value for name, value in state.items()}
    assert largest(tokens_of(model, x), dinov2_forward(plain, x)[:, 1:]) < CLOSE


@pytest.mark.slow
def test_gep_base(tmp_path):
    state = dinov2_state(width=768, registers=4, chans=20, prefix="event_encoder.", side=16)
    save_file(state, tmp_path / "gep.safetensors")
    model = import_encoder(tmp_path / "gep.safetensors", "gep").model
    assert model.encoder.config["arch"] == "vit_base_patch14_reg4_dinov2"
    x = frames(20, 224, 224)
    plain = {name.removeprefix("event_encoder."): value for name, value in state.items()}
    assert largest(tokens_of(model, x), dinov2_forward(plain, x)[:, 1:]) < CLOSE


@pytest.mark.parametrize("gated, bias", [(0, False), (0, True), (1536, False)])
def test_dinov3_gives_the_tokens_of_its_own_forward(tmp_path, gated, bias):
    state = dinov3_state(gated=gated, bias=bias)
    save_file(state, tmp_path / "w.safetensors")
    imported = import_encoder(tmp_path / "w.safetensors", "dinov3", size=(64, 96), normalise="none")
    arch = f"vit_small_{'plus_' * bool(gated)}patch16_dinov3{'_qkvb' * bias}"
    assert imported.model.encoder.config["arch"] == arch
    x = frames(3, 64, 96)
    assert largest(tokens_of(imported.model, x), dinov3_forward(state, x)[:, 1:]) < CLOSE
    assert "rope_embed.periods" in imported.table and "0 left over" in imported.table


def test_dinov3_refuses_other_periods_and_biased_keys(tmp_path):
    state = dinov3_state(depth=12)
    save_file(dict(state, **{"rope_embed.periods": 50 ** (torch.arange(16) / 16)}), tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="rope_embed.periods are not those of base 100"):
        import_encoder(tmp_path / "p.safetensors", "dinov3")
    save_file({**state, "blocks.3.attn.qkv.bias_mask": torch.ones(1152)}, tmp_path / "k.safetensors")
    with pytest.raises(ValueError, match="blocks.3.attn.qkv.bias is not zero on the keys"):
        import_encoder(tmp_path / "k.safetensors", "dinov3")
    halved = dict(state, **{"rope_embed.periods": state["rope_embed.periods"] * 1.001})
    save_file(halved, tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match="in float32 or bfloat16"):
        import_encoder(tmp_path / "h.safetensors", "dinov3")


def test_dinov3_turns_by_the_releases_rounded_periods(tmp_path):
    """The releases hold them in bfloat16; an encoder that computes them in float32 is off by far more than allowed."""
    state = dinov3_state()
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    save_file(state, tmp_path / "r.safetensors")
    imported = import_encoder(tmp_path / "r.safetensors", "dinov3", size=(64, 96), normalise="none")
    assert imported.model.encoder.config["rope_bf16"] and "rounded to bfloat16" in imported.table
    imported.model.save_pretrained(tmp_path / "m")
    x, model = frames(3, 64, 96), GEPModel.from_pretrained(tmp_path / "m")
    want = dinov3_forward(state, x)[:, 1:]
    assert largest(tokens_of(model, x), want) < CLOSE
    with torch.no_grad():  # cast down and up again, its periods are still those
        assert largest(tokens_of(model.bfloat16().float(), x), want) < 0.5
    assert torch.equal(model.encoder.vit.rope.periods.cpu(), state["rope_embed.periods"].float())
    plain = GEPModel.from_config({**imported.model.config, "encoder": {**model.encoder.config, "rope_bf16": False}})
    plain.load_state_dict(imported.model.state_dict())
    assert largest(tokens_of(plain.eval(), x), want) > 10 * CLOSE
    with pytest.raises(ValueError, match="rope_bf16 has no meaning for encoder arch 'nano'"):
        EventEncoder("nano", rope_bf16=True)


@pytest.mark.parametrize("quick", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_open_clip_image_tower(tmp_path, quick):
    width, depth, side = (768, 12, 2) if quick else (256, 10, 4)
    state = clip_state(width=width, depth=depth, side=side)
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "c.pt")
    imported = import_encoder(tmp_path / "c.pt", "open_clip", quick_gelu=quick, normalise="none")
    x = frames(3, 16 * side, 16 * side)
    assert largest(tokens_of(imported.model, x), clip_forward(state, x, quick=quick)[:, 1:]) < CLOSE
    assert "0 left over" in imported.table and "of the text tower" in imported.table
    assert imported.model.encoder.config["arch"].startswith("vit_base_patch16_clip_quick" if quick else "vit_xsmall")


@pytest.mark.slow
def test_open_clip_names_are_those_of_the_library(tmp_path):
    import open_clip

    model = open_clip.create_model("ViT-B-32", force_image_size=64).eval()
    torch.save(model.state_dict(), tmp_path / "c.pt")
    imported = import_encoder(tmp_path / "c.pt", "open_clip", normalise="none")
    x = frames(3, 64, 64)
    model.visual.output_tokens = True
    with torch.no_grad():
        want = model.visual.ln_post(model.visual(x)[1]) if model.visual.final_ln_after_pool else model.visual(x)[1]
    assert largest(tokens_of(imported.model, x), want.double()) < CLOSE and "0 left over" in imported.table


def test_timm_and_its_towers_in_open_clip(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=5).eval()
    for block in vit.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.1)
    torch.nn.init.normal_(vit.pos_embed)
    x = frames(3, 48, 48)
    with torch.no_grad():
        want = vit.forward_features(x)[:, 1:].double()
    save_file(vit.state_dict(), tmp_path / "t.safetensors")
    imported = import_encoder(tmp_path / "t.safetensors", "timm", arch="vit_tiny_patch16_224", normalise="none")
    assert largest(tokens_of(imported.model, x), want) < CLOSE and "2 not needed, 0 left over" in imported.table
    state = {f"visual.trunk.{name}": value for name, value in vit.state_dict().items() if "head" not in name}
    state |= {"visual.head.proj.weight": torch.zeros(4, 192), "text.ln_final.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "o.pt")
    imported = import_encoder(tmp_path / "o.pt", "open_clip", arch="vit_tiny_patch16_224", normalise="none")
    assert largest(tokens_of(imported.model, x), want) < CLOSE and "2 not needed, 0 left over" in imported.table
    with pytest.raises(ValueError, match="give --arch"):
        import_encoder(tmp_path / "t.safetensors", "timm")


def test_another_number_of_channels_keeps_the_response_to_equal_ones(tmp_path):
    state = dinov2_state(depth=12)
    torch.save(state, tmp_path / "w.pth")
    imported = import_encoder(tmp_path / "w.pth", "dinov2", representation="voxel_grid", params={"bins": 5})
    assert imported.model.encoder.in_chans == 5 and "mean over 3 channels, scaled by 3/5 for 5" in imported.table
    x = frames(1, 70, 70)
    want = dinov2_forward(state, x.expand(-1, 3, -1, -1))[:, 1:]
    assert largest(tokens_of(imported.model, x.expand(-1, 5, -1, -1)), want) < CLOSE


def test_images_models_normalise_their_event_images(tmp_path):
    state = dinov2_state()
    torch.save(state, tmp_path / "w.pth")
    model = import_encoder(tmp_path / "w.pth", "dinov2").model
    x = frames(3, 70, 70)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = dinov2_forward(state, (x - mean[:, None, None]) / std[:, None, None])[:, 1:]
    assert largest(tokens_of(model, x), want) < 2 * CLOSE
    assert import_encoder(tmp_path / "w.pth", "dinov2", representation="tencode").model.encoder.config["mean"] is None


def test_what_no_rule_knows_is_an_error_unless_allowed(tmp_path):
    state = dinov2_state() | {"blocks.2.attn.new": torch.zeros(3), "projector.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not know: blocks.2.attn.new, projector.weight.*--allow-leftover"):
        import_encoder(tmp_path / "w.pth", "dinov2")
    imported = import_encoder(tmp_path / "w.pth", "dinov2", allow_leftover=True)
    assert "2 left over" in imported.table and "projector.weight" in imported.table
    count = len(state)
    assert f"\n{count} tensors: {count - 3} mapped, 0 changed, 1 not needed, 2 left over" in imported.table
    del state["blocks.7.norm2.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="missing: blocks.7.norm2.bias"):
        import_encoder(tmp_path / "w.pth", "dinov2", allow_leftover=True)


def test_bad_files_and_settings_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pth"):
        import_encoder(tmp_path / "none.pth", "dinov2")
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="bad.pth cannot be read as weights"):
        import_encoder(tmp_path / "bad.pth", "dinov2")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "object.pth")
    with pytest.raises(ValueError, match="object.pth cannot be read as weights"):
        import_encoder(tmp_path / "object.pth", "dinov2")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no state dict .epoch."):
        import_encoder(tmp_path / "empty.pth", "dinov2")
    save_file(dinov2_state(width=128, depth=2), tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="128 wide with 2 blocks, patch 14 and 0 registers; known are small"):
        import_encoder(tmp_path / "odd.safetensors", "dinov2")
    save_file(clip_state(), tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="has no patch_embed.proj.weight, so it is not of this layout"):
        import_encoder(tmp_path / "clip.safetensors", "dinov2")
    save_file(dinov2_state(side=3), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="size 50x64 is no multiple of the patch of 14: give 56x70"):
        import_encoder(tmp_path / "w.safetensors", "dinov2", size=(50, 64))
    two = dinov2_state(side=3, prefix="a.") | dinov2_state(side=3, prefix="b.")
    save_file(two, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="holds 2 encoders, under 'a.', 'b.': give --prefix"):
        import_encoder(tmp_path / "two.safetensors", "dinov2")


def test_training_checkpoint_and_command(tmp_path, capsys):
    state = dinov2_state(side=3, prefix="backbone.", chunk=True) | {"dino_head.mlp.0.bias": torch.zeros(2)}
    torch.save({"teacher": state, "iteration": 7}, tmp_path / "t.pth")
    out = tmp_path / "m"
    main(["import", str(tmp_path / "t.pth"), str(out), "--layout", "dinov2", "--representation", "stacked_histogram",
          "bins=2", "--windows", "3", "--fit", "pad", "--height", "42", "--width", "56"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "backbone.blocks.0.{0…11}.attn.qkv.weight" in printed or "backbone.blocks.{0.0…0.11}" in printed
    assert "pretraining only" in printed and "beside the state dict, not read: iteration" in printed
    model = GEPModel.from_pretrained(out)
    assert model.encoder.in_chans == 4 and model.input_settings["windows"] == 3
    assert model.encode(recording()).tokens.shape == (1, 3, 12, 384)
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "none.pth"), str(out), "--layout", "dinov2"])
    assert "none.pth" in capsys.readouterr().err
