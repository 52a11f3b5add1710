"""hf: readers on a LLaVA of random weights: its own pixels, greedy answers, exact scores, gradients, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from downstream.llm_evrep.readers import Reader, build_reader, hf_pixels

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
TEXTS = ["a grey cat, sitting", "zebra", "Two dogs run over the grass."]


def make_tokenizer(kind="bytes"):
    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":  # as GPT-2, Llama 3 and Qwen have it
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as Llama 2 has it, and LLaVA 1.5 with it
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*TEXTS, "USER ASSISTANT: What is in the image? cat dogs"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
    )


def save(folder, *, template=TEMPLATE, image_processor=None, kind="bytes"):
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # as made, the image hardly matters
            p.mul_(4 if p.ndim > 1 and "embed" not in name else 1)
    model.save_pretrained(folder)
    if image_processor is None:
        image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return folder, save(folder)


@pytest.fixture(scope="module")
def reader(llava):
    return build_reader(f"hf:{llava[0]}", max_new_tokens=8, batch_size=2)


def noise(num, height, width, seed=0):
    return torch.randint(0, 256, (num, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def by_hand(reader, image, question, start=False):
    """Inputs of one image, by the processor alone, with a start token of the tokenizer or without."""
    return reader.processor(images=pil(image), text=question, add_special_tokens=start, return_tensors="pt")


@pytest.mark.parametrize("size", [(28, 28), (36, 51), (57, 20)])
@pytest.mark.parametrize("options", [{}, {"resample": 2, "do_center_crop": False, "size": {"height": 28, "width": 28}}])
def test_pixels_are_the_processors_own(size, options):
    default = {"size": {"shortest_edge": 28}, "crop_size": {"height": 25, "width": 28}}
    processor = CLIPImageProcessor(**{**default, **options})
    images = noise(2, *size)
    want = torch.stack([processor(pil(image), return_tensors="pt")["pixel_values"][0] for image in images])
    got = hf_pixels.pixel_values(images.float() / 255, processor)
    level = 1 / 255 / torch.tensor(processor.image_std)[:, None, None]
    assert got.shape == want.shape and ((got - want).abs() / level).max() < 1.1  # it rounds to 8 bits on the way
    hf_pixels.check(images, processor, want)
    with pytest.raises(hf_pixels.Unknown, match="levels"):
        hf_pixels.check(images, processor, want + 3 * level)


@torch.no_grad()
def test_answers_are_greedy_by_the_models_own_logits(llava, reader):
    _, model = llava
    images = noise(3, 36, 51)
    told = []
    texts = reader.describe(images, "What is in the image?", on_answer=lambda i, text: told.append((i, text)))
    assert isinstance(reader, Reader) and reader.has_weights and told == list(enumerate(texts))
    assert texts == reader.describe(images.float() / 255 + 0.001, "What is in the image?") and len(set(texts)) > 1
    assert reader.usage["images"] == 6 and reader.usage["calls"] == 4 and reader.usage["tokens"] > 6
    question = "<s>USER: <image>\nWhat is in the image? ASSISTANT:"
    assert reader.question("What is in the image?") == question
    for image, text in zip(images, texts):
        inputs = by_hand(reader, image, question)
        ids, said = inputs["input_ids"], []
        while len(said) < 8 and 2 not in said:
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits[0, -1]
            said.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor([[said[-1]]])], dim=1)
        assert text == reader.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind, keep", [("bytes", True), ("bytes", False), ("metaspace", True)])
def test_scores_are_the_full_softmaxs_step_by_step(llava, reader, kind, keep, monkeypatch, tmp_path):
    _, model = llava
    if kind != "bytes":
        model = save(tmp_path / kind, kind=kind)
        reader = build_reader(f"hf:{tmp_path / kind}")
    monkeypatch.setattr(reader, "_can_keep", keep)
    images = noise(3, 28, 28, seed=1)  # no resize: the processor's pixels to the bit
    question = "<s>USER: <image>\nWhat is in the image? ASSISTANT:"
    got = reader.token_log_probs(images, TEXTS, "What is in the image?")
    for image, text, score in zip(images, TEXTS, got):
        inputs = by_hand(reader, image, question)
        ids, want = inputs["input_ids"], []
        assert ids[0, :2].tolist() != [1, 1] and (ids == 3).sum() == 4
        for token in reader.tokenizer(" " + text, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                row = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits[0, -1]
            row = row.double().numpy()
            want.append(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        # A space of its own before the text covers none of it; spans are without the space before a word.
        want = want[-len(score.spans) :]
        assert score.log_probs.dtype == torch.float32 and len(score.spans) == len(want)
        np.testing.assert_allclose(score.log_probs.detach(), want, atol=2e-4)
        covered = {k for a, b in score.spans for k in range(a, b)}
        assert covered >= {k for k, char in enumerate(text) if not char.isspace()}
        assert all(a < b and (text[a:b].isspace() or text[a:b] == text[a:b].strip()) for a, b in score.spans)
    assert (
        len({round(float(s.log_probs[0].detach()), 3) for s in reader.token_log_probs(images, ["zebra"] * 3, "")}) == 3
    )


@pytest.mark.parametrize("size", [(28, 28), (33, 40)])
def test_gradient_reaches_the_pixels_alone(llava, size):
    reader = build_reader(f"hf:{llava[0]}")
    reader.model.double()
    images = (torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 0.2 + 0.4).requires_grad_()

    def total(x):
        scores = reader.token_log_probs(x, TEXTS[:2], "What?")
        return torch.stack([score.log_probs.double().sum() for score in scores]).sum()

    (grad,) = torch.autograd.grad(total(images), images)
    assert grad.abs().amax(dim=(1, 2, 3)).min() > 1e-3
    for seed in range(2):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            slope = float((total(images + 2e-4 * direction) - total(images - 2e-4 * direction)) / 4e-4)
        along = float((grad * direction).sum())
        assert along == pytest.approx(slope, rel=2e-3, abs=0.03) and abs(along) > 0.2
    assert all(p.grad is None and not p.requires_grad for p in reader.model.parameters())


@torch.no_grad()
def test_without_a_template_the_image_token_comes_first(llava, tmp_path):
    save(tmp_path / "plain", template=None)
    reader = build_reader(f"hf:{tmp_path / 'plain'}", max_new_tokens=2)
    assert reader.question("What?") == "<image>\nWhat?\n" and reader.question("See: <image>") == "See: <image>"
    images = noise(1, 28, 28)
    (score,) = reader.token_log_probs(images, ["zebra"], "What?")
    ids = reader.tokenizer("zebra", add_special_tokens=False)["input_ids"]  # after a new line: no space
    inputs = by_hand(reader, images[0], "<image>\nWhat?\n", start=True)
    assert inputs["input_ids"][0, 0] == 1
    row = reader.model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)
    assert float(score.log_probs[0]) == pytest.approx(float(row[ids[0]]), abs=1e-4) and len(score.spans) == len(ids)
    assert len(reader.describe(images, "What?")) == 1


def test_what_cannot_be_reproduced_is_refused(llava, tmp_path):
    images = noise(1, 30, 44).float() / 255
    odd = CLIPImageProcessor(size={"longest_edge": 28, "shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    save(tmp_path / "odd", image_processor=odd)
    with pytest.raises(ValueError, match=r"size=.*loss\.estimator=score"):
        build_reader(f"hf:{tmp_path / 'odd'}").token_log_probs(images, ["zebra"], "What?")
    # Rescaled twice by the processor, once as its settings have it: the numbers differ, and that is seen.
    reader = build_reader(f"hf:{llava[0]}")
    processor, own = reader.processor, reader.processor.image_processor

    class Other(type(own)):
        def _preprocess(self, *args, **kwargs):
            out = super()._preprocess(*args, **kwargs)
            out["pixel_values"] = out["pixel_values"] * 0.5
            return out

    own.__class__ = Other
    with pytest.raises(ValueError, match=r"other numbers.*loss\.estimator=score"):
        reader.token_log_probs(images, ["zebra"], "What?")
    assert processor.image_processor is own and len(reader.describe(images, "What?")) == 1
    with pytest.raises(ValueError, match="image token"):
        reader.token_log_probs(images, ["an <image>"], "What?")


def test_names_tell_weights_and_settings_apart(llava, reader, tmp_path):
    folder, _ = llava
    low = build_reader(f"hf:{folder}", max_new_tokens=8, dtype="bfloat16")
    assert low.model.dtype == torch.bfloat16 and low.name != reader.name and str(folder.parent) not in reader.name
    images = noise(2, 36, 51)
    full, rough = (r.token_log_probs(images, ["zebra"] * 2, "What?")[0].log_probs for r in (reader, low))
    assert rough.dtype == torch.float32 and (full - rough).abs().max() < 1 and len(low.describe(images, "What?")) == 2


def test_errors_name_the_way_on(llava, tmp_path, monkeypatch):
    folder, _ = llava
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in folder.iterdir():
        (partial / file.name).write_bytes(file.read_bytes())
    state = load_file(partial / "model.safetensors")
    name = next(name for name in state if "q_proj.weight" in name)
    save_file({k: v for k, v in state.items() if k != name}, partial / "model.safetensors", metadata={"format": "pt"})
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if "safetensors" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    torch.save(state, bare / "pytorch_model.bin")  # a pickle is no way round
    text = tmp_path / "text"
    LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(text)
    make_tokenizer().save_pretrained(text)
    cases = [
        (dict(spec=f"hf:{tmp_path / 'none'}"), FileNotFoundError, "llm.name=hf:<folder"),
        (dict(spec="hf:llava-hf/no-such-model"), FileNotFoundError, "llm.name=hf:<folder"),
        (dict(spec=f"hf:{bare}"), FileNotFoundError, "safetensors"),
        (dict(spec=f"hf:{partial}"), ValueError, name.rsplit(".", 2)[-2]),
        (dict(spec=f"hf:{text}"), ValueError, "no image-text-to-text model"),
        (dict(spec=f"hf:{folder}", dtype="int8"), ValueError, "bfloat16"),
        (dict(spec=f"hf:{folder}", quantise="2bit"), ValueError, "8bit, 4bit"),
    ]
    for keywords, kind, words in cases:
        with pytest.raises(kind) as error:
            build_reader(**keywords)
        assert words in str(error.value), str(error.value)
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        build_reader(f"hf:{folder}", quantise="4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a GPU"):
            build_reader(f"hf:{folder}", quantise="8bit")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava"
