"""CoCa captions on random weights: greedy by the model's own logits, teacher-forced scores, gradients, errors."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from downstream.llm_evrep.readers import Reader, build_reader
from downstream.llm_evrep.readers.coca import tokenize

ARCH = "coca_evrep_tiny"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "patch_size": 16,
        "head_width": 16,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "custom_text": True,
}
SOT, EOT = 49406, 49407


@pytest.fixture(scope="module")
def coca(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coca")
    (folder / f"{ARCH}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(ARCH).eval()
    with torch.no_grad():
        # As made, the decoder's output barely depends on the image, and is not set at all.
        model.text_decoder.text_projection.normal_(std=0.5)
        for p in model.visual.parameters():
            p.mul_(3)
        for block in model.text_decoder.cross_attn:
            for p in block.parameters():
                p.mul_(3)
    torch.save(model.state_dict(), folder / "coca.pt")
    return folder / "coca.pt", model


@pytest.fixture(scope="module")
def reader(coca):
    return build_reader(f"open_clip:{ARCH}", file=str(coca[0]), max_new_tokens=6, batch_size=2)


def noise(num, height, width, seed=0):
    return torch.randint(0, 256, (num, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("size", [(32, 32), (48, 71), (40, 21)])
def test_pixels_are_open_clips_own(reader, size):
    images = noise(2, *size)
    model = reader.model
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    want = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    got = reader.pixel_values(images)
    assert got.shape == want.shape
    # Pillow rounds to 8 bits after the resize, between its two passes as well.
    std = torch.tensor(model.visual.preprocess_cfg["std"])[:, None, None]
    assert ((got - want) * std).abs().max() < 1.6 / 255


@torch.no_grad()
def test_captions_are_greedy_by_the_models_own_logits(coca, reader):
    _, model = coca
    images = noise(3, 32, 32)
    told = []
    texts = reader.describe(images, "What is it?", on_answer=lambda index, text: told.append((index, text)))
    assert isinstance(reader, Reader) and reader.has_weights and told == list(enumerate(texts))
    assert texts == reader.describe(images, "something else") and len(set(texts)) > 1
    assert reader.usage["images"] == 6 and reader.usage["calls"] == 4
    tokenizer = SimpleTokenizer()
    for image, text in zip(images, texts):
        ids = [SOT]
        while len(ids) < 7 and ids[-1] != EOT:
            logits = model(reader.pixel_values(image[None]), torch.tensor([ids]), output_labels=False)["logits"][0, -1]
            logits[[0, SOT]] = float("-inf")
            ids.append(int(logits.argmax()))
        said = tokenizer.decode([k for k in ids[1:] if k != EOT])
        assert text == " ".join(said.split())


@torch.no_grad()
def test_captions_end_with_the_end_token(coca, reader, monkeypatch):
    images, steps = noise(2, 32, 32), []

    def logits(seen, ids):
        steps.append(ids.shape[1])
        out = torch.zeros(len(ids), ids.shape[1], 49408)
        out[:, -1, 320] = 1  # "a"
        out[0, -1, EOT] = 2 if ids.shape[1] == 3 else 0
        out[1, -1, EOT] = 2 if ids.shape[1] == 2 else 0
        out[:, -1, 0] = 9  # padding cannot be said
        return out

    monkeypatch.setattr(reader, "_logits", logits)
    assert reader.describe(images, "") == ["a a", "a"] and steps == [1, 2, 3]


def test_scores_are_the_full_softmaxs_step_by_step(coca, reader):
    _, model = coca
    images = noise(3, 40, 32, seed=1)
    texts = ["a photo of a cat .", "Two dogs, running", "zebra"]
    tokenizer = SimpleTokenizer()
    got = reader.token_log_probs(images, texts, "ignored")
    for image, text, score in zip(images, texts, got):
        ids, want = tokenizer.encode(text), []
        with torch.no_grad():
            for step, token in enumerate(ids):  # one image, one prefix at a time, no padding
                prefix = torch.tensor([[SOT, *ids[:step]]])
                logits = model(reader.pixel_values(image[None]), prefix, output_labels=False)["logits"][0, -1]
                row = logits.double().numpy()
                want.append(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))
        assert score.log_probs.dtype == torch.float32
        np.testing.assert_allclose(score.log_probs.detach(), want, atol=1e-4)
    assert [texts[1][a:b] for a, b in got[1].spans] == ["Two", "dogs", ",", "running"]
    assert len({round(float(s.log_probs[0].detach()), 4) for s in reader.token_log_probs(images, ["a"] * 3, "")}) == 3


def test_gradient_reaches_the_pixels_alone(coca):
    reader = build_reader(f"open_clip:{ARCH}", file=str(coca[0]))
    reader.model.double()
    images = (torch.rand(2, 3, 36, 40, generator=torch.Generator().manual_seed(3)) * 0.2 + 0.4).requires_grad_()

    def total(x):
        return torch.cat([score.log_probs for score in reader.token_log_probs(x, ["a cat", "zebra"], "")]).sum()

    (grad,) = torch.autograd.grad(total(images), images)
    for seed in range(2):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            slope = float((total(images + 1e-4 * direction) - total(images - 1e-4 * direction)) / 2e-4)
        along = float((grad * direction).sum())
        assert abs(along) > 10 and along == pytest.approx(slope, rel=5e-3, abs=0.05)
    assert all(p.grad is None and not p.requires_grad for p in reader.model.parameters())


def test_tokens_cover_their_characters():
    tokenizer = SimpleTokenizer()
    text = "  A Photograph of Łódź's  café&amp;bar , 42"
    ids, spans = tokenize(tokenizer, text)
    assert ids == tokenizer.encode(text)
    said = [text[a:b] for a, b in spans]
    assert said[:3] == ["A", "Photograph", "of"] and said[-3:] == [",", "4", "2"]
    # Written otherwise than said, a word is covered whole by each of its tokens.
    assert said.count("café&amp;bar") == 3
    assert set(range(18, 22)) <= {k for a, b in spans for k in range(a, b)}
    assert all(0 <= a < b <= len(text) and not any(c.isspace() for c in text[a:b]) for a, b in spans)


def test_low_precision_and_errors(coca, reader, tmp_path, monkeypatch):
    file, spec = str(coca[0]), f"open_clip:{ARCH}"
    low = build_reader(spec, file=file, dtype="bfloat16", max_new_tokens=99)
    images = noise(2, 32, 32)
    assert low.max_new_tokens == 19 and low.name != reader.name and len(low.describe(images, "")) == 2
    full, rough = (r.token_log_probs(images, ["a cat"] * 2, "")[0].log_probs for r in (reader, low))
    assert rough.dtype == torch.float32 and (full - rough).abs().max() < 0.3
    with pytest.raises(ValueError, match="text of 20 tokens"):
        reader.token_log_probs(images, ["a", "a " * 20], "")
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    torch.save({"logit_scale": torch.zeros(())}, tmp_path / "other.pt")
    known = "open_clip:coca_ViT-B-32"

    def offline(*_, **keywords):
        raise OSError("Name or service\nnot known")

    cases = [
        (dict(spec="open_clip:ViT-B-32"), ValueError, "coca_ViT-B-32"),
        (dict(spec=f"{known}/nope"), ValueError, "coca_ViT-B-32/laion2b_s13b_b90k"),
        (dict(spec=spec), ValueError, "llm.file"),
        (dict(spec=spec, file=file, dtype="int8"), ValueError, "bfloat16"),
        (dict(spec=spec, file=str(tmp_path / "none.pt")), FileNotFoundError, "none.pt"),
        (dict(spec=spec, file=str(tmp_path / "bad.pt")), ValueError, "bad.pt"),
        (dict(spec=spec, file=str(tmp_path / "other.pt")), ValueError, "other.pt"),
        (dict(spec="open_clip:coca_roberta-ViT-B-32", file=file), ValueError, "tokenizer"),
    ]
    for keywords, kind, words in cases:
        with pytest.raises(kind) as error:
            build_reader(**keywords)
        assert words in str(error.value), str(error.value)
    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"not known\): pass llm\.file="):
        build_reader(f"{known}/laion2b_s13b_b90k")
