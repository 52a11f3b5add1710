"""Readers: the tagger's probabilities against a float64 count, its gradient, and answers that outlive a crash."""

import itertools
import json
import math

import numpy as np
import open_clip
import pytest
import torch

from downstream.llm_evrep.readers import Answers, CachedReader, Reader, answer_key, build_reader, to_uint8
from downstream.llm_evrep.readers.base import fingerprint
from gep.models import FrozenVFM, ImageModel

CLASSES = ["cat", "water_bird", "dog", "cat, wild"]
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def save_teacher(folder, seed=0):
    torch.manual_seed(seed)
    config = {"arch": "nano", "in_chans": 3, "img_size": [24, 24], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    model = ImageModel(config, CLASSES).eval()
    with torch.no_grad():
        model.class_head.weight.mul_(3)  # probabilities that differ
    model.save(folder)
    return model


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger") / "export"
    return folder, save_teacher(folder)


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 24, 24), generator=g, dtype=torch.uint8)


def plackett_luce(logits, order):
    """log p of drawing `order` without replacement from softmax(logits), by float64 sums."""
    weights, total = np.exp(np.asarray(logits, dtype=np.float64)), []
    for k in order:
        total.append(math.log(weights[k] / weights.sum()))
        weights[k] = 0
    return total


def test_tagger_says_its_likeliest_words(export, images):
    folder, model = export
    reader = build_reader(f"tagger:{folder}", words=2)
    assert isinstance(reader, Reader) and reader.has_weights
    told = []
    texts = reader.describe(images, "What?", on_answer=lambda index, text: told.append((index, text)))
    assert told == list(enumerate(texts)) and reader.usage == {"calls": 1, "images": 3}
    logits = model(images).detach().numpy()
    said = ["cat", "water bird", "dog", "cat, wild"]
    assert texts == [", ".join(said[k] for k in np.argsort(-row)[:2]) for row in logits]
    # Floats are rounded to what the cache knows them by.
    assert reader.describe(images / 255 + 0.4 / 255, "What?") == texts
    assert reader.logits(images.float() / 255).sub(torch.from_numpy(logits)).abs().max() < 1e-5


def test_tagger_probabilities_are_plackett_luces(export, images):
    folder, model = export
    reader = build_reader(f"tagger:export:{folder}")
    said = ["cat", "water bird", "dog", "cat, wild"]
    logits = model(images).detach().numpy()
    texts = ["dog", "cat, wild, dog, cat", "cat, water bird, dog, cat, wild"]
    orders = [[2], [3, 2, 0], [0, 1, 2, 3]]
    for row, order, scores, text in zip(logits, orders, reader.token_log_probs(images, texts, ""), texts):
        assert [text[start:end] for start, end in scores.spans] == [said[k] for k in order]
        assert scores.log_probs.dtype == torch.float32
        np.testing.assert_allclose(scores.log_probs.detach(), plackett_luce(row, order), atol=2e-5)
    # Over all ordered pairs they sum to one: nothing else can be said.
    pairs = [", ".join(pair) for pair in itertools.permutations(said, 2)]
    scores = reader.token_log_probs(images[:1].expand(len(pairs), -1, -1, -1), pairs, "")
    assert sum(math.exp(score.log_probs.sum()) for score in scores) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [(24, 24), (17, 31)])
def test_tagger_gradient_reaches_pixels_and_nothing_else(export, size):
    reader = build_reader(f"tagger:{export[0]}")
    # Away from 0 and 1, where the clamp after the resize has its kink; in float64 for the differences.
    reader.teacher.to(dtype=torch.float64)
    images = (torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)) * 0.3 + 0.35).requires_grad_()
    texts = ["dog, cat", "water bird"]

    def total(x):
        return torch.cat([score.log_probs for score in reader.token_log_probs(x, texts, "")]).sum()

    (grad,) = torch.autograd.grad(total(images), images)
    assert grad.abs().amax(dim=(1, 2, 3)).min() > 1e-3
    for seed in range(3):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            step = 2e-3
            slope = (total(images + step * direction) - total(images - step * direction)) / (2 * step)
        assert float(slope) == pytest.approx(float((grad * direction).sum()), rel=5e-3, abs=5e-4)
    assert all(p.grad is None and not p.requires_grad for part in reader.teacher._parts() for p in part.parameters())


def test_features_keep_their_no_grad_beside_the_differentiable_path(export, images):
    teacher = FrozenVFM.from_spec(f"export:{export[0]}")
    pixels = (images / 255).requires_grad_()
    plain, live = teacher.features(pixels), teacher.features_with_grad(pixels)
    assert all(torch.equal(a, b) and not a.requires_grad and b.requires_grad for a, b in zip(plain, live))
    assert teacher.native_size == (24, 24)


def test_tagger_of_a_text_tower(tmp_path, images):
    (tmp_path / "evrep-tagger-clip.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("evrep-tagger-clip").eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    words = ["polar_bear", "kite", "digit seven"]
    options = {"file": str(tmp_path / "clip.pt"), "prompt_template": "a drawing of a {}."}
    spec = "tagger:open_clip:evrep-tagger-clip"
    reader = build_reader(spec, vocabulary=words, words=3, **options)
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    pixels = torch.nn.functional.interpolate(images / 255, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        prompts = [f"a drawing of a {word}." for word in ("polar bear", "kite", "digit seven")]
        text = model.encode_text(open_clip.get_tokenizer("evrep-tagger-clip")(prompts), normalize=True)
        logits = model.logit_scale.exp() * model.encode_image((pixels - mean) / std, normalize=True) @ text.T
    scores = reader.token_log_probs(images, ["kite, polar bear"] * 3, "")
    for row, score in zip(logits.numpy(), scores):
        np.testing.assert_allclose(score.log_probs.detach(), plackett_luce(row, [1, 0]), atol=1e-4)
    said = ["polar bear", "kite", "digit seven"]
    assert reader.describe(images, "") == [", ".join(said[k] for k in np.argsort(-row)) for row in logits.numpy()]
    other = build_reader(spec, vocabulary=words[:2], words=2, **options)
    assert other.name != reader.name and str(tmp_path) not in reader.name
    with pytest.raises(ValueError, match=r"llm\.vocabulary"):
        build_reader(spec, **options)
    with pytest.raises(ValueError, match=r"prompt_template 'a photo'"):
        build_reader(spec, vocabulary=words, file=options["file"], prompt_template="a photo")


def test_a_teacher_trained_anew_is_another_reader(export, tmp_path):
    folder, _ = export
    names = [build_reader(f"tagger:{folder}", words=words).name for words in (1, 2)]
    save_teacher(tmp_path / "export", seed=1)
    names.append(build_reader(f"tagger:{tmp_path / 'export'}").name)
    assert len({name.split("@")[1] for name in names}) == 3 and all(name.startswith("tagger:") for name in names)


def test_large_weights_are_told_apart_by_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("downstream.llm_evrep.readers.base._WHOLE", 1 << 20)
    data = np.random.default_rng(0).integers(0, 256, 6 << 20, dtype=np.uint8)
    data.tofile(tmp_path / "a.bin")
    before = fingerprint([tmp_path / "a.bin"])
    assert before == fingerprint([tmp_path / "a.bin"]) and len(before) == 12
    data[-1] ^= 1
    data.tofile(tmp_path / "a.bin")
    assert fingerprint([tmp_path / "a.bin"]) != before


def test_a_matrix_changed_anywhere_in_large_weights_is_seen(tmp_path):
    file = tmp_path / "a.bin"
    names = []
    for start in (None, 1 << 19, 133_333_333, 299 << 20):  # a matrix of 1 MiB each, the rest as before
        with file.open("wb") as stream:
            stream.truncate(300 << 20)
            if start is not None:
                stream.seek(start)
                stream.write(bytes([7]) * (1 << 20))
        names.append(fingerprint([file]))
    assert len(set(names)) == 4


def test_classes_called_otherwise_are_another_reader(export, tmp_path):
    import shutil

    shutil.copytree(export[0], tmp_path / "export")
    before = build_reader(f"tagger:{tmp_path / 'export'}")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    config["classes"] = config["classes"][::-1]
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    after = build_reader(f"tagger:{tmp_path / 'export'}")
    assert after.vocabulary == before.vocabulary[::-1] and after.name != before.name


@pytest.mark.parametrize("setting, value", [("batch_size", 3), ("max_new_tokens", 5), ("concurrency", 2),
                                            ("price_in", 1.0), ("requests_per_minute", 9.0)])  # fmt: skip
def test_settings_that_a_reader_has_no_use_for_are_named(export, setting, value, recwarn):
    with pytest.warns(UserWarning, match=rf"llm\.{setting} has no effect on tagger"):
        build_reader(f"tagger:{export[0]}", **{setting: value})
    recwarn.clear()
    build_reader(f"tagger:{export[0]}", words=2, vocabulary=[])
    assert not recwarn.list


def test_tagger_errors_name_the_fault(export, images, tmp_path):
    folder, _ = export
    spec = f"tagger:{folder}"
    cases = [
        (dict(spec="llava:x"), ValueError, "hf:<Hub id or folder>, openai:<model>"),
        (dict(spec="tagger:"), ValueError, "tagger:<teacher spec"),
        (dict(spec=spec, words=5), ValueError, "llm.words = 5"),
        (dict(spec=spec, vocabulary=["a"]), ValueError, "llm.vocabulary"),
        (dict(spec=f"tagger:{tmp_path / 'none'}"), FileNotFoundError, "llm.name=tagger:"),
        (dict(spec="tagger:open_clip:ViT-B-32", file=str(tmp_path / "no.pt")), FileNotFoundError, "llm.file="),
    ]
    for keywords, kind, words in cases:
        with pytest.raises(kind) as error:
            build_reader(**keywords)
        assert words in str(error.value), str(error.value)
    with pytest.warns(UserWarning, match=r"llm\.quantise has no effect on tagger"):
        reader = build_reader(spec, quantise="8bit")
    for texts, words in ((["dog", "fish", "cat"], "'fish'"), (["dog, dog"] * 3, "twice"), (["dog"], "1 texts for 3")):
        with pytest.raises(ValueError, match=words):
            reader.token_log_probs(images, texts, "")
    with pytest.raises(ValueError, match="NaN"):
        reader.describe(torch.full((1, 3, 24, 24), float("nan")), "")


class Counting:
    """A reader that says each image's first pixel, and can be made to fail after some answers."""

    name, has_weights = "counting:1", False

    def __init__(self, fail_after=None):
        self.usage, self.seen, self.fail_after = {"calls": 0.0}, [], fail_after

    def describe(self, images, prompt, *, on_answer=None):
        assert images.dtype == torch.uint8
        texts = []
        for index in reversed(range(len(images))):  # an endpoint answers in any order
            if len(self.seen) == self.fail_after:
                raise ConnectionError("gone")
            self.seen.append(int(images[index, 0, 0, 0]))
            texts.insert(0, f"{prompt} {self.seen[-1]}")
            if on_answer:
                on_answer(index, texts[0])
        return texts

    def token_log_probs(self, images, texts, prompt):
        raise ValueError("estimator=score")


def numbered(*values):
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def test_answers_are_asked_for_once(tmp_path):
    inner = Counting()
    reader = CachedReader(inner, Answers(tmp_path))
    assert isinstance(reader, Reader) and reader.name == "counting:1" and not reader.has_weights
    told = {}
    texts = reader.describe(numbered(5, 7, 5, 9), "see", on_answer=told.__setitem__)
    assert texts == ["see 5", "see 7", "see 5", "see 9"] and told == dict(enumerate(texts))
    assert sorted(inner.seen) == [5, 7, 9] and (reader.hits, reader.misses) == (1, 3)
    told.clear()
    # Floats are known by their 8 bits; another prompt is another question.
    assert reader.describe(numbered(9, 1) / 255, "see", on_answer=told.__setitem__) == ["see 9", "see 1"]
    assert told == {0: "see 9", 1: "see 1"} and (reader.hits, reader.misses) == (2, 4)
    assert reader.describe(numbered(9), "look") == ["look 9"] and inner.seen[3:] == [1, 9]
    again = CachedReader(Counting(fail_after=0), Answers(tmp_path, rank=1))
    assert again.describe(numbered(9, 5, 7, 1), "see") == ["see 9", "see 5", "see 7", "see 1"] and again.misses == 0
    with pytest.raises(ValueError, match="estimator=score"):
        reader.token_log_probs(numbered(1), ["x"], "see")


def test_a_crash_loses_nothing_answered(tmp_path):
    with pytest.raises(ConnectionError):
        CachedReader(Counting(fail_after=2), Answers(tmp_path)).describe(numbered(1, 2, 3, 4), "see")
    file = tmp_path / "answers-0.jsonl"
    assert len(file.read_text().splitlines()) == 2
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "00", "te')  # torn while being written
    inner = Counting()
    reader = CachedReader(inner, Answers(tmp_path))
    assert file.read_bytes() == whole
    assert reader.describe(numbered(1, 2, 3, 4), "see") == ["see 1", "see 2", "see 3", "see 4"]
    assert sorted(inner.seen) == [1, 2]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 4 and {line["reader"] for line in lines} == {"counting:1"}


def test_paid_answers_wait_for_the_disk_and_local_ones_do_not(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    reader = CachedReader(Counting(), Answers(tmp_path))
    reader.describe(numbered(1, 2, 3), "see")
    assert len(synced) == 3
    local = Counting()
    local.has_weights = True
    CachedReader(local, Answers(tmp_path)).describe(numbered(4, 5), "see")
    assert len(synced) == 3
    # The process may die at once: what was said is in the file.
    assert len(Answers(tmp_path, rank=1)) == 5


def test_cached_answers_do_not_know_the_trainers_precision(tmp_path):
    class Precise(Counting):
        def describe(self, images, prompt, *, on_answer=None):
            return [str(torch.is_autocast_enabled("cpu"))] * len(images)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert CachedReader(Precise(), Answers(tmp_path)).describe(numbered(1), "see") == ["False"]


def test_answers_of_other_ranks_and_damaged_lines(tmp_path):
    mine, other = Answers(tmp_path, rank=0), Answers(tmp_path, rank=3)
    other.put("k", "Ünïcode \n two lines \ud800", tokens=3)
    assert mine.get("k") is None
    mine.refresh()
    assert mine.get("k") == "Ünïcode \n two lines \ud800" and len(mine) == 1
    (tmp_path / "answers-7.jsonl").write_bytes(b'{"key": "a", "text": "b"}\n\x00\x00\n[1]\n{"key": "c", "text": "d"}\n')
    with pytest.warns(UserWarning, match=r"answers-7\.jsonl: lines \[2, 3\]"):
        mine.refresh()
    assert mine.get("a") == "b" and mine.get("c") == "d"
    with pytest.raises(ValueError, match="is a file"):
        Answers(tmp_path / "answers-7.jsonl")


def test_keys_tell_reader_prompt_size_and_pixels_apart():
    image = torch.zeros(3, 2, 8, dtype=torch.uint8)
    other = image.clone()
    other[2, 1, 7] = 1
    keys = [
        answer_key("ab", "c", image),
        answer_key("a", "bc", image),
        answer_key("ab", "d", image),
        answer_key("ab", "c", other),
        answer_key("ab", "c", image.reshape(3, 4, 4)),
    ]
    assert len(set(keys)) == 5 and all(len(key) == 64 for key in keys)
    turned = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3).permute(2, 0, 1)
    assert answer_key("a", "b", turned) == answer_key("a", "b", turned.contiguous())
    assert torch.equal(
        to_uint8(torch.tensor([-1.0, 0.5, 2.0])[None, :, None, None]).flatten(), torch.tensor([0, 128, 255])
    )
