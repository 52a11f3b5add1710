"""The frozen image model: features against the libraries' own, frozen in every sense, clear errors."""

import json

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import nn

from gep.models import EventEncoder, FrozenVFM, ImageModel
from gep.models import teacher_timm as timm_source

TINY, SIZE = "vit_tiny_patch16_224", 32
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=g, dtype=torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of TINY at 32 px, and the model it came from."""
    torch.manual_seed(0)
    vit = timm.create_model(TINY, img_size=SIZE).eval()
    nn.init.normal_(vit.pos_embed, std=0.5)
    folder = tmp_path_factory.mktemp("weights")
    save_file(vit.state_dict(), folder / "tiny.safetensors")
    torch.save({"state_dict": vit.state_dict()}, folder / "tiny.pth")
    return folder, vit


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A registered tiny open_clip architecture, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "gep-tiny.json").write_text(json.dumps(CLIP))
    (folder / "gep-tiny-quick.json").write_text(json.dumps({**CLIP, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("gep-tiny").eval()
    torch.save(model.state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt", model


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.pth"])
def test_timm_features_are_timms_with_its_own_normalisation(weights, image, name):
    folder, vit = weights
    teacher = FrozenVFM.from_spec(f"timm:{TINY}", file=folder / name, image_size=SIZE)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD))
    want = vit.forward_features((image / 255 - mean) / std)
    tokens, pooled = teacher.features(image)
    torch.testing.assert_close(tokens, want[:, 1:])
    torch.testing.assert_close(pooled, want[:, 1:].mean(1))
    assert all(torch.equal(a, b) for a, b in zip(teacher.features(image / 255), (tokens, pooled)))
    assert teacher.grid(SIZE, SIZE) == (2, 2) and (teacher.embed_dim, teacher.pooled_dim) == (192, 192)
    by_class = FrozenVFM.from_spec(f"timm:{TINY}", file=folder / name, image_size=SIZE, pool="cls")
    torch.testing.assert_close(by_class.features(image)[1], want[:, 0])
    assert teacher.classify(pooled) is None and teacher.logit_scale is None
    with pytest.raises(ValueError, match="text tower"):
        teacher.text(["a photo"])


@torch.no_grad()
def test_an_encoder_started_from_the_teacher_gives_its_tokens(weights, clip, image):
    folder, _ = weights
    teacher = FrozenVFM.from_spec(f"timm:{TINY}", file=folder / "tiny.pth", image_size=SIZE)
    encoder = EventEncoder(TINY, 3, (SIZE, SIZE), mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD).eval()
    assert encoder.init_from_teacher(teacher).left == ()
    assert torch.equal(encoder(image / 255)[0], teacher.features(image)[0])


@torch.no_grad()
def test_images_are_resized_only_when_asked(weights):
    folder, _ = weights
    big = torch.rand(1, 3, 2 * SIZE, 3 * SIZE)
    asked = FrozenVFM.from_spec(f"timm:{TINY}", file=folder / "tiny.pth", image_size=SIZE)
    small = nn.functional.interpolate(big, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(asked.features(big)[0], asked.features(small)[0])
    assert asked.grid(64, 96) == (2, 2)
    free = FrozenVFM.from_spec(f"timm:{TINY}", pretrained=False)
    assert free.features(big)[0].shape == (1, 4 * 6, 192) and free.grid(64, 96) == (4, 6)
    with pytest.raises(ValueError, match="resize it to 48x48"):
        free.features(torch.rand(1, 3, 40, 40))


def test_frozen_in_every_sense(weights, image):
    folder, _ = weights

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = FrozenVFM.from_spec(f"timm:{TINY}", file=folder / "tiny.pth", image_size=SIZE)
            self.own = nn.Linear(2, 2)

    task = Task()
    assert {name for name, _ in task.named_parameters()} == {"own.weight", "own.bias"}
    assert set(task.state_dict()) == {"own.weight", "own.bias"} and len(list(task.modules())) == 2
    before = task.teacher.features(image)
    task.train().double()  # reaches neither its mode nor its dtype
    model = task.teacher.visual
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters()) and task.teacher.dtype == torch.float32
    after = task.teacher.features(image)
    assert all(torch.equal(a, b) and not b.requires_grad and not b.is_inference() for a, b in zip(before, after))
    # Its result can be saved for backward, and a low-precision copy answers in float32.
    x = torch.randn_like(after[0], requires_grad=True)
    (x * after[0]).sum().backward()
    assert torch.equal(x.grad, after[0])
    low = task.teacher.to(dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.features(image)[0].dtype == torch.float32


@torch.no_grad()
def test_open_clip_features_text_and_timm_copy(clip, image):
    file, model = clip
    teacher = FrozenVFM.from_spec("open_clip:gep-tiny", file=file)
    pixels = image / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    tokens, pooled = teacher.features(image)
    torch.testing.assert_close(pooled, model.encode_image((pixels - mean) / std))
    x = model.visual._embeds((pixels - mean) / std)
    torch.testing.assert_close(tokens, model.visual.ln_post(model.visual.transformer(x))[:, 1:])
    assert (teacher.embed_dim, teacher.pooled_dim) == (32, 24) and teacher.grid(32, 32) == (2, 2)
    prompts = ["a zero", "a one", "a two"]
    text = teacher.text(prompts)
    want = model.encode_text(open_clip.get_tokenizer("gep-tiny")(prompts), normalize=True)
    torch.testing.assert_close(text, want)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    assert teacher.logit_scale == pytest.approx(1 / 0.07, rel=1e-5) and teacher.classify(pooled) is None
    # The timm copy that an encoder starts from gives the same tokens.
    copy = teacher.visual
    torch.testing.assert_close(copy.forward_features((pixels - mean) / std)[:, 1:], tokens, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"teacher\.image_size"):
        teacher.features(torch.rand(1, 3, 48, 48))
    resized = FrozenVFM.from_spec("open_clip:gep-tiny", file=file, image_size=48)
    assert resized.features(image)[0].shape == (2, 9, 32)


@torch.no_grad()
def test_quick_gelu_reaches_the_timm_copy(clip, image):
    torch.manual_seed(0)
    teacher = FrozenVFM.from_spec("open_clip:gep-tiny-quick", pretrained=False)
    for p in teacher._model.visual.parameters():
        p.mul_(3)  # far enough from 0 for the two activations to differ
    tokens, _ = teacher.features(image)
    mean, std = teacher._mean, teacher._std
    torch.testing.assert_close(
        teacher.visual.forward_features((image / 255 - mean) / std)[:, 1:], tokens, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_an_exported_stand_in_is_a_teacher(tmp_path, image):
    torch.manual_seed(0)
    config = {"arch": "nano", "in_chans": 3, "img_size": [36, 36], "mean": [0.2] * 3, "std": [0.4] * 3}
    model = ImageModel(config, ["cat", "dog"]).eval()
    model.save(tmp_path / "vfm", metrics={"top1": 96.5})
    teacher = FrozenVFM.from_spec(f"export:{tmp_path / 'vfm'}")
    picture = torch.randint(0, 256, (2, 3, 36, 36), dtype=torch.uint8)
    tokens, pooled = teacher.features(picture)
    want, mean = model.encoder(picture / 255)
    torch.testing.assert_close(tokens, want)
    torch.testing.assert_close(pooled, mean)
    torch.testing.assert_close(teacher.classify(pooled), model(picture))
    assert teacher.classes == ["cat", "dog"] and "top1" in (tmp_path / "vfm" / "README.md").read_text()
    encoder = EventEncoder("nano", 2, (36, 36))
    report = encoder.init_from_teacher(teacher)
    assert [name for name, _ in report.adapted] == ["patch_embed.conv1.weight"] and report.left == ()
    assert torch.equal(encoder.vit.pos_embed, model.encoder.vit.pos_embed)
    with pytest.raises(ValueError, match=r"teacher\.file"):
        FrozenVFM.from_spec(f"export:{tmp_path / 'vfm'}", file=tmp_path / "vfm" / "model.safetensors")
    with pytest.raises(ValueError, match="class token"):
        FrozenVFM.from_spec(f"export:{tmp_path / 'vfm'}", pool="cls")


def test_no_network_is_one_error_with_two_ways_on(monkeypatch, clip):
    def offline(*_, **keywords):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(timm_source.timm, "create_model", offline)
    monkeypatch.setattr(open_clip, "create_model", offline)
    for spec in ("timm:vit_small_patch14_reg4_dinov2.lvd142m", "open_clip:ViT-B-16/openai"):
        with pytest.raises(FileNotFoundError) as error:
            FrozenVFM.from_spec(spec)
        for words in (spec, "Name or service not known", "teacher.file=", "teacher.name=export:"):
            assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_errors_name_the_fault(weights, clip, tmp_path):
    folder, _ = weights
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    torch.save({"blocks.0.norm1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    tiny = f"timm:{TINY}"
    cases = [
        (dict(spec="dinov2"), ValueError, "timm:<name>"),
        (dict(spec="timm:"), ValueError, "timm:<name>"),
        (dict(spec="timm:vit_smal_patch14_dinov2"), ValueError, "vit_small_patch14_dinov2"),
        (dict(spec="timm:resnet18"), ValueError, "patch tokens"),
        (dict(spec=tiny + ".nope"), ValueError, "vit_tiny_patch16_224.augreg_in21k"),
        (dict(spec=tiny, file=tmp_path / "none.pth"), FileNotFoundError, "none.pth"),
        (dict(spec=tiny, file=tmp_path / "bad.safetensors"), ValueError, "bad.safetensors"),
        (dict(spec=tiny, file=tmp_path / "bad.pth"), ValueError, "bad.pth"),
        (dict(spec=tiny, file=tmp_path / "other.pth"), ValueError, "missing"),
        (dict(spec=tiny, pretrained=False, pool="max"), ValueError, "mean, cls"),
        (dict(spec=tiny, pretrained=False, image_size=40), ValueError, "48x48"),
        (dict(spec="open_clip:ViT-X/openai"), ValueError, "no architecture 'ViT-X'"),
        (dict(spec="open_clip:ViT-B-16/nope"), ValueError, "laion2b_s34b_b88k"),
        (dict(spec="open_clip:gep-tiny", file=folder / "tiny.pth"), ValueError, "tiny.pth"),
        (dict(spec="open_clip:gep-tiny", pretrained=False, pool="cls"), ValueError, "pool"),
        (dict(spec=f"export:{tmp_path / 'nowhere'}"), FileNotFoundError, "nowhere"),
    ]
    for keywords, kind, words in cases:
        with pytest.raises(kind) as error:
            FrozenVFM.from_spec(**keywords)
        assert words in str(error.value), (keywords, str(error.value))
    teacher = FrozenVFM.from_spec(tiny, pretrained=False, image_size=SIZE)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        teacher.features(torch.zeros(2, 1, 32, 32))
