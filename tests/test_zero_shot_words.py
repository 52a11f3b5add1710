"""Zero-shot with words: the numbers of open_clip's own classifier, from an export that names its teacher."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_hub import recording

from gep.models import FrozenVFM
from gep.models.words import class_vectors
from tests.clip_models import ARCH, aligned, tiny_clip

WORDS = ["cat", "dog", "paper plane"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny open_clip model, and a checkpoint of it."""
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("templates", [None, "openai", "simple", ["a photo of a {}.", "events of a {}"]])
def test_words_give_the_cosines_of_open_clips_classifier(tmp_path, clip, templates):
    model, (file, tower) = aligned(clip[0], tmp_path), clip
    events = [recording(0), recording(1)]
    named = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    own = ["{}"] if templates is None else named.get(templates, templates) if isinstance(templates, str) else templates
    want = open_clip.build_zero_shot_classifier(tower, open_clip.get_tokenizer(ARCH), WORDS, own)
    got = model.zero_shot(events, WORDS, templates=templates, file=file)
    with torch.no_grad():
        embedded = F.normalize(model.encoder.embed(model.encode(events).pooled.mean(1)), dim=-1)
    torch.testing.assert_close(got, embedded @ want, atol=1e-6, rtol=0)
    assert got.shape == (2, 3) and (want.T @ want - torch.eye(3)).abs().max() > 0.01


def test_templates_are_averaged_before_the_length_is_made_one(clip):
    teacher = FrozenVFM.from_spec(f"open_clip:{ARCH}", file=clip[0])
    one, two = teacher.text(["a cat", "the cat"])
    (got,) = class_vectors(teacher, ["cat"], ["a {}", lambda name: f"the {name}"])
    torch.testing.assert_close(got, (one + two) / (one + two).norm())
    torch.testing.assert_close(class_vectors(teacher, ["a cat", "the cat"]), torch.stack([one, two]))


def test_the_tower_is_loaded_once_and_never_exported(tmp_path, clip, monkeypatch):
    model = aligned(clip[0], tmp_path / "m")
    names, count = set(model.state_dict()), sum(p.numel() for p in model.parameters())
    model.zero_shot(recording(), ["a cat", "a dog"], file=clip[0])
    monkeypatch.setattr(FrozenVFM, "from_spec", lambda *_, **__: pytest.fail("loaded again"))
    first = model.zero_shot(recording(), ["a cat", "a dog"])
    assert set(model.state_dict()) == names and sum(p.numel() for p in model.parameters()) == count
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    vectors = model.word_vectors(["a cat", "a dog"])
    assert torch.equal(model.zero_shot(recording(), vectors), first)  # as before, by vectors


def test_what_cannot_work_is_said(tmp_path, clip):
    model = aligned(clip[0], tmp_path / "m")
    with pytest.raises(ValueError, match="give a list of strings"):
        model.zero_shot(recording(), "a cat", file=clip[0])
    with pytest.raises(ValueError, match="templates='imagenet': choose one of openai, simple"):
        model.zero_shot(recording(), WORDS, templates="imagenet")
    with pytest.raises(ValueError, match="sentences with a {}"):
        model.zero_shot(recording(), WORDS, templates=["a photo"])
    with pytest.raises(ValueError, match="no effect without words"):
        model.zero_shot(recording(), torch.ones(2, 24), templates="simple")
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        aligned(clip[0], tmp_path / "n").zero_shot(recording(), WORDS, file=tmp_path / "none.pt")
    with pytest.raises(ValueError, match="vectors have 8 features, those of open_clip:gep-words 24"):
        aligned(clip[0], tmp_path / "o", head_dim=8).zero_shot(recording(), WORDS, file=clip[0])
    model.teacher = "timm:vit_tiny_patch16_224"
    model._text = None
    with pytest.raises(ValueError, match="aligned with timm:vit_tiny_patch16_224, which has no text tower"):
        model.zero_shot(recording(), WORDS)
    model.teacher = None
    with pytest.raises(ValueError, match="does not say what it was aligned with"):
        model.zero_shot(recording(), WORDS)
