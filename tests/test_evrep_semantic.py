"""Semantic consistency: the soft Jaccard against the exact one, gradients against differences and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from downstream.llm_evrep.config import LossConfig
from downstream.llm_evrep.readers.base import TokenScores
from downstream.llm_evrep.semantic import (
    NoSemantic,
    ScoreSemantic,
    SoftSemantic,
    expected_words,
    soft_jaccard,
    word_log_probs,
)
from downstream.llm_evrep.words import jaccard, words

PROMPT = "What is it?"


def pieces(text: str) -> list[tuple[int, int]]:
    """Spans of at most three characters, spaces before words included, as subword tokens have them."""
    return [(start, min(start + 3, len(text))) for start in range(0, len(text), 3)]


class Stub:
    """p(token) = sigmoid(weights · pixels), with weights of the token's own characters; answers by a function."""

    name, has_weights = "stub", True

    def __init__(self, answer: Callable[[Tensor], str] = lambda image: "") -> None:
        self.usage: dict[str, float] = {"images": 0}
        self.answer, self.calls = answer, []

    def describe(self, images: Tensor, prompt: str, *, on_answer: object = None) -> list[str]:
        assert prompt == PROMPT and not images.requires_grad
        self.calls.append(images.clone())
        return [self.answer(image) for image in images]

    def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
        assert prompt == PROMPT
        found = []
        for image, text in zip(images, texts, strict=True):
            spans = pieces(text)
            values = [torch.nn.functional.logsigmoid((self._weights(text[a:b], image) * image).sum()) for a, b in spans]
            found.append(TokenScores(spans, torch.stack(values)))
        return found

    def _weights(self, piece: str, image: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, piece)))
        return torch.randn(image.shape, generator=generator, dtype=image.dtype) / 2


def images(count: int, size: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


# ---- soft -------------------------------------------------------------------------------------------


def test_soft_jaccard_is_the_exact_one_where_probabilities_are_0_or_1() -> None:
    reference = words("a red dog on green grass")
    outside = ["cat", "sofa", "bike", "tree"]
    for said in range(2 ** len(reference)):
        kept = {word for bit, word in enumerate(sorted(reference)) if said >> bit & 1}
        for extras in range(len(outside) + 1):
            answer = frozenset(kept | set(outside[:extras]))
            hit, extra, count = (torch.tensor(float(n)) for n in (len(kept), extras, len(reference)))
            assert soft_jaccard(hit, extra, count).item() == pytest.approx(jaccard(answer, reference))
    zero = torch.zeros(())
    assert soft_jaccard(zero, zero, zero).item() == jaccard(frozenset(), frozenset()) == 1


def test_expected_words_by_hand() -> None:
    text = "A red dog, the dog!"
    # "A", " red", " d", "og,", " the", " dog", "!": only the first occurrence of dog counts, of two tokens.
    spans = [(0, 1), (1, 5), (5, 7), (7, 10), (10, 14), (14, 18), (18, 19)]
    p = torch.tensor([0.9, 0.5, 0.8, 0.25, 0.1, 0.01, 0.3])
    hit, extra, count = expected_words(TokenScores(spans, p.log()), text)
    assert hit.item() == pytest.approx(0.5 + 0.8 * 0.25) and count.item() == 2
    assert extra.item() == pytest.approx(0.5 + 0.8)
    assert soft_jaccard(hit, extra, count).item() == pytest.approx(0.7 / 3.3)
    # Words after the reader's last token are not counted at all, and nothing said asks for nothing.
    cut = expected_words(TokenScores(spans[:2], p[:2].log()), text)
    assert [part.item() for part in cut] == pytest.approx([0.5, 0.5, 1])
    assert [part.item() for part in expected_words(TokenScores([], torch.zeros(0)), "of the")] == [0, 0, 0]


@pytest.mark.parametrize("said", [0b00, 0b01, 0b10, 0b11])
def test_certain_tokens_give_the_jaccard_of_an_answer_as_long(said: int) -> None:
    text = "dog grass"
    certain = torch.tensor([0.0 if said >> bit & 1 else float("-inf") for bit in range(2)])
    found = soft_jaccard(*expected_words(TokenScores([(0, 3), (3, 9)], certain), text))
    answer = frozenset(word if said >> bit & 1 else f"other{bit}" for bit, word in enumerate(["dog", "grass"]))
    assert found.item() == pytest.approx(jaccard(answer, words(text)))


@pytest.mark.parametrize("form", ["linear", "log"])
@pytest.mark.parametrize("text", ["description", "words"])
def test_gradient_to_the_pixels_against_finite_differences(form: str, text: str) -> None:
    texts = ["a red dog on the grass", "seven", "the dog chases a dog"]
    semantic = SoftSemantic(Stub(), PROMPT, text=text, form=form)

    def loss(x: Tensor) -> Tensor:
        return semantic.loss(x, texts, keys=["a", "b", "c"], step=0)["loss"]

    x = images(3).requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,), eps=1e-6, atol=1e-8, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.flatten(1).abs().amax(dim=1).min() > 1e-4


def test_a_batch_is_the_mean_of_its_samples() -> None:
    reader, x = Stub(), images(4)
    texts = ["a red dog", "of the", "seven", "two cats and a dog"]
    expected = []
    for image, text in zip(x, texts):
        (scores,) = reader.token_log_probs(image[None], [text], PROMPT)
        expected.append(soft_jaccard(*expected_words(scores, text)))
    assert expected[1] == 1, "a description without words asks for nothing"
    for form in ("linear", "log"):
        found = SoftSemantic(reader, PROMPT, form=form).loss(x, texts, keys=list("abcd"), step=0)
        assert found["jaccard"].item() == pytest.approx(sum(expected).item() / 4)
        losses = [1 - value if form == "linear" else -value.log() for value in expected]
        assert found["loss"].item() == pytest.approx(sum(losses).item() / 4)
    empty = SoftSemantic(reader, PROMPT).loss(x[:1], ["the"], keys=["a"], step=0)
    assert empty["loss"] == 0 and empty["jaccard"] == 1


def test_log_form_keeps_a_gradient_where_probabilities_underflow() -> None:
    class Hopeless(Stub):
        def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
            return [TokenScores([(0, 2), (2, 5)], -90 + image.flatten()[:2]) for image in images]

    x = images(1, dtype=torch.float32).requires_grad_()
    found = SoftSemantic(Hopeless(), PROMPT, form="log").loss(x, ["seven"], keys=["a"], step=0)
    found["loss"].backward()
    first = x.detach().flatten()[:2]
    assert found["loss"].item() == pytest.approx(180 - first.sum().item() + math.log(2), rel=1e-5)
    assert x.grad.flatten()[:2].tolist() == pytest.approx([-1, -1]) and torch.isfinite(x.grad).all()
    assert word_log_probs(*Hopeless().token_log_probs(x, ["seven"], PROMPT), "seven").exp() == 0


def test_views_are_contrast_and_brightness_drawn_by_sample_and_step() -> None:
    class Seen(Stub):
        def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
            self.calls.append(images)
            return super().token_log_probs(images, texts, prompt)

    reader = Seen()
    semantic = SoftSemantic(reader, PROMPT, views=0.5, seed=3)
    x = images(1).clamp(0.2, 0.8).expand(400, -1, -1, -1)
    keys, texts = [str(number) for number in range(400)], ["a dog"] * 400
    semantic.loss(x, texts, keys=keys, step=0)
    semantic.loss(x[:2].flip(0), texts[:2], keys=["1", "0"], step=0)
    semantic.loss(x[:2], texts[:2], keys=["0", "1"], step=1)
    first, swapped, later = reader.calls
    assert torch.equal(first[:2], swapped.flip(0)) and not torch.allclose(first[:2], later)
    assert first.min() == 0 and first.max() == 1
    # What was not clipped is a straight line of x; its slope and offset are uniform in 1 ± 0.5 and ± 0.5.
    flat, source = first.flatten(1), x[0].flatten()
    whole = (flat > 0).all(dim=1) & (flat < 1).all(dim=1)
    assert whole.sum() > 20
    design = torch.stack([source, torch.ones_like(source)], dim=1)
    lines = torch.linalg.lstsq(design, flat[whole].T).solution
    assert torch.allclose(design @ lines, flat[whole].T, atol=1e-6)
    assert lines[0].min() > 0.5 and lines[0].max() < 1.5 and lines[0].std() > 0.15 and lines[1].abs().max() < 0.5
    y = x[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: semantic.loss(z, texts[:3], keys=keys[:3], step=0)["loss"], (y,))
    for wrong in ({"soft_views": 1.0}, {"soft_views": 0.2, "estimator": "score"}):
        with pytest.raises(ValueError, match="loss.soft_views"):
            LossConfig(**wrong)


def test_training_on_soft_finds_the_image_that_the_reader_describes_so() -> None:
    semantic = SoftSemantic(Stub(), PROMPT)
    x = torch.zeros(1, 3, 3, 3, requires_grad=True)
    for _ in range(60):
        found = semantic.loss(x, ["red dog"], keys=["a"], step=0)
        (gradient,) = torch.autograd.grad(found["loss"], x)
        x = (x - 2 * gradient).detach().requires_grad_()
    assert found["jaccard"] > 0.9


# ---- score ------------------------------------------------------------------------------------------

SIGMA = 0.2


def two_words() -> tuple[Stub, Callable[[Tensor], Tensor]]:
    """A reader that says each of two words beyond a plane of its own, and its smoothed Jaccard in closed form.

    Against {dog, cat} the Jaccard of its answers is (number said) / 2, so that its mean over ε is the mean of two
    normal distribution functions of the distance to the planes.
    """
    planes = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    offsets = (planes * 0.5).sum(dim=(1, 2, 3)) + torch.tensor([0.15, -0.2])

    def answer(image: Tensor) -> str:
        beyond = (planes * image).sum(dim=(1, 2, 3)) > offsets
        return " and ".join(word for word, said in zip(["a dog", "cats"], beyond) if said)

    def smoothed(x: Tensor) -> Tensor:
        distance = ((planes * x[:, None]).sum(dim=(2, 3, 4)) - offsets) / (SIGMA * planes.flatten(1).norm(dim=1))
        return torch.special.ndtr(distance).mean(dim=1)

    return Stub(answer), smoothed


@pytest.mark.parametrize("trained", [False, True])
def test_score_is_unbiased_for_the_smoothed_jaccard(trained: bool) -> None:
    reader, smoothed = two_words()
    x = 0.35 + 0.3 * images(2, size=2).float()
    exact = x.double().requires_grad_()
    (1 - smoothed(exact)).mean().backward()
    semantic = ScoreSemantic(reader, PROMPT, samples=50, sigma=SIGMA)
    if trained:  # any baseline that does not see ε leaves the estimate unbiased
        torch.nn.init.constant_(semantic.baseline.bias, 0.4)
        torch.nn.init.normal_(semantic.baseline.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    draws, values = [], []
    for step in range(300):
        y = x.clone().requires_grad_()
        found = semantic.loss(y, ["a cat, a dog"] * 2, keys=["a", "b"], step=step)
        found["loss"].backward()
        draws.append(y.grad.double())
        values.append(found["loss"].item())
    drawn = torch.stack(draws)
    error = drawn.std(dim=0) / math.sqrt(len(drawn))
    # 24 components: 4.5 standard errors are passed by chance once in 6,000 times; a wrong sign or scale is far outside.
    assert ((drawn.mean(dim=0) - exact.grad).abs() < 4.5 * error).all()
    assert error.max() < 0.15 * exact.grad.abs().max()
    value = (1 - smoothed(x.double())).mean().item()
    assert sum(values) / len(values) == pytest.approx(value, abs=4.5 * 0.5 / math.sqrt(300 * 100))


def test_a_fitting_baseline_lowers_the_variance() -> None:
    reader, smoothed = two_words()
    x = torch.full((1, 3, 2, 2), 0.56)
    spread = []
    for bias in (0.0, smoothed(x.double()).item()):
        semantic = ScoreSemantic(reader, PROMPT, samples=8, sigma=SIGMA)
        torch.nn.init.constant_(semantic.baseline.bias, bias)
        draws = []
        for step in range(100):
            y = x.clone().requires_grad_()
            semantic.loss(y, ["a dog, a cat"], keys=["a"], step=step)["loss"].backward()
            draws.append(y.grad)
        spread.append(torch.stack(draws).var(dim=0).sum().item())
    assert spread[1] < 0.7 * spread[0]


def test_the_baseline_learns_the_reward_and_never_moves_the_image() -> None:
    reader, smoothed = two_words()
    x = torch.full((4, 3, 2, 2), 0.5).requires_grad_()
    semantic = ScoreSemantic(reader, PROMPT, samples=16, sigma=SIGMA)
    optimiser = torch.optim.SGD(semantic.parameters(), lr=0.02)
    for step in range(150):
        found = semantic.loss(x, ["a dog and a cat"] * 4, keys=list("abcd"), step=step)
        assert set(found) == {"loss", "jaccard", "baseline"}
        assert torch.autograd.grad(found["baseline"], x, retain_graph=True, allow_unused=True) == (None,)
        grads = torch.autograd.grad(found["loss"], list(semantic.parameters()), retain_graph=True, allow_unused=True)
        assert grads == (None, None)
        optimiser.zero_grad()
        found["baseline"].backward()
        optimiser.step()
    said = semantic.baseline(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))
    assert said.detach().mean().item() == pytest.approx(smoothed(x.detach().double()).mean().item(), abs=0.05)


def test_perturbations_are_one_call_and_a_function_of_seed_step_and_key() -> None:
    def asked(keys: list[str], step: int, seed: int = 0) -> Tensor:
        reader = Stub()
        semantic = ScoreSemantic(reader, PROMPT, samples=3, sigma=0.1, seed=seed)
        torch.manual_seed(len(keys) + step)  # the global generator has no part in it
        semantic.loss(x[: len(keys)], ["dog"] * len(keys), keys=keys, step=step)
        (images,) = reader.calls
        return images.unflatten(0, (len(keys), 3))

    x = torch.full((2, 3, 8, 8), 0.5)
    both = asked(["a", "b"], 4)
    assert both.shape == (2, 3, 3, 8, 8) and torch.equal(both, asked(["a", "b"], 4))
    assert torch.equal(both[1:], asked(["b"], 4)), "another rank would show the sample otherwise"
    assert not torch.equal(both, asked(["a", "b"], 5)) and not torch.equal(both, asked(["a", "b"], 4, seed=1))
    assert both.std().item() == pytest.approx(0.1, rel=0.1) and both.mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_budget_is_never_passed_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    reader = Stub(lambda image: "dog")
    semantic = ScoreSemantic(reader, PROMPT, samples=2, budget=11)
    x = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    found = [semantic.loss(x, ["dog"] * 2, keys=["a", "b"], step=step) for step in range(5)]
    assert semantic.shown == sum(map(len, reader.calls)) == 8
    assert ["jaccard" in values for values in found] == [True, True, False, False, False]
    found[-1]["loss"].backward()
    assert found[-1]["loss"] == 0 and not x.grad.any()
    said = capsys.readouterr().err
    assert said.count("loss.score_budget=11: 8 images") == 1 and "before step 3" in said


# ---- choosing an estimator --------------------------------------------------------------------------


def test_estimators_by_reader_and_the_way_out() -> None:
    assert LossConfig().resolve(True) == "soft" and LossConfig().resolve(False) == "score"
    assert LossConfig(estimator="none").resolve(None) == LossConfig(semantic=0.0).resolve(None) == "none"
    assert LossConfig(estimator="score").resolve(True) == "score"
    with pytest.raises(ValueError, match=r"llm\.name"):
        LossConfig().resolve(None)
    with pytest.raises(ValueError, match=r"loss\.estimator=score"):
        LossConfig(estimator="soft").resolve(False)
    for given in ({"soft_form": "log"}, {"soft_views": 0.5}, {"soft_text": "words"}):
        for estimator in ("auto", "score"):
            with pytest.raises(ValueError, match=rf"loss\.{next(iter(given))}"):
                LossConfig(**given, estimator=estimator).resolve(False)
    with pytest.warns(UserWarning, match=r"loss\.score_sigma=0\.1, loss\.score_budget=7 has no effect"):
        assert LossConfig(score_sigma=0.1, score_budget=7).resolve(True) == "soft"
    for wrong, message in (
        ({"fidelity": 0.0, "estimator": "none"}, "nothing is left"),
        ({"fidelity": 0.0, "semantic_start": 3}, "semantic_start=3"),
        ({"semantic": -1.0}, "semantic=-1"),
        ({"score_sigma": 0.0}, "score_sigma"),
        ({"score_samples": 0}, "score_samples"),
    ):
        with pytest.raises(ValueError, match=message):
            LossConfig(**wrong)
    stub = Stub()
    stub.has_weights = False
    with pytest.raises(ValueError, match="score"):
        SoftSemantic(stub, PROMPT)


def test_warm_up_is_linear_from_the_start_step() -> None:
    loss = LossConfig(semantic=2.0, semantic_start=3, semantic_warmup=4)
    assert [loss.semantic_weight(step) for step in range(9)] == [0, 0, 0, 0.5, 1, 1.5, 2, 2, 2]
    assert [LossConfig().semantic_weight(step) for step in (0, 5)] == [1, 1]
    slow = LossConfig(fidelity=0.5, fidelity_warmup=4)
    assert [slow.fidelity_weight(step) for step in (0, 1, 3, 9)] == [0.125, 0.25, 0.5, 0.5]
    assert LossConfig().fidelity_weight(0) == 1


def test_none_leaves_a_graph_and_no_gradient() -> None:
    x = images(2).requires_grad_()
    NoSemantic().loss(x, ["dog"] * 2, keys=["a", "b"], step=0)["loss"].backward()
    assert not x.grad.any()
