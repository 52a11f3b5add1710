"""Semantic consistency: 1 − Jaccard of the words of two descriptions, and how pixels receive a gradient of it.

The words are discrete: a description changes by jumps or not at all, so that 1 − J of two described images has no
gradient anywhere. Two estimators give one:

- `soft` takes the reader's probabilities for jumps. The RGB frame's description is teacher-forced through the frozen
  reader that looks at the generated image; each of its words w is said with a probability p(w), and J becomes expected
  intersection over expected union. It is differentiable to the pixels and has no noise, but supposes a reader that
  keeps to the description's order of words.
- `score` asks the reader about x + σε, ε Gaussian, and follows what the exact Jaccard of its answers says of ε
  (REINFORCE). It needs answers alone, and is an unbiased gradient of the Jaccard smoothed over ε, at a high variance.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.llm_evrep.readers.base import Reader, TokenScores
from downstream.llm_evrep.words import jaccard, word_spans, words
from gep import distributed

_POOL = 4  # the baseline sees the image as so many rows and columns


def soft_jaccard(hit: Tensor, extra: Tensor, count: Tensor) -> Tensor:
    """Expected intersection over expected union of word sets.

    Args:
        hit: expected number of reference words that are said, ≥ 0.
        extra: expected number of words said that are none of the reference's, ≥ 0.
        count: number of reference words; all three float of one shape.
    Returns:
        hit / (count + extra) in [0, 1], 1 where count and extra are 0: the Jaccard where probabilities are 0 or 1.
    """
    union = count + extra
    return torch.where(union > 0, hit / union.clamp_min(torch.finfo(union.dtype).tiny), torch.ones_like(union))


def word_log_probs(scores: TokenScores, text: str) -> Tensor:
    """How likely a reader says each word of a text where the text has it first.

    Args:
        scores: of the tokens of `text`.
        text: the teacher-forced text.
    Returns:
        (n,) float32 log p(word) = sum over the tokens that cover any of its characters. Words that no token covers (the
        reader cut the text off) are left out.
    """
    covered = _tokens_of_words(scores, text)
    rows = [scores.log_probs[own].sum() for own in covered]
    return torch.stack(rows) if rows else scores.log_probs.new_zeros(0)


def expected_words(scores: TokenScores, text: str) -> tuple[Tensor, Tensor, Tensor]:
    """What `soft_jaccard` takes: expected words hit, expected extra words, and the number of reference words.

    A reference word that is not said is supposed to be replaced by one outside of the reference, so that answers are as
    long as the reference: extra = Σ (1 − p).

    Args:
        scores: of the tokens of `text`.
        text: the reference description, teacher-forced.
    Returns:
        Three float32 scalars.
    """
    p = word_log_probs(scores, text).exp()
    return p.sum(), (1 - p).sum(), p.new_tensor(float(len(p)))


class NoSemantic(nn.Module):
    """The estimator of no semantic term."""

    def loss(self, images: Tensor, texts: Sequence[str], *, keys: Sequence[str], step: int) -> dict[str, Tensor]:
        """A loss of 0 on the images' graph."""
        return {"loss": images.sum() * 0}


class SoftSemantic(nn.Module):
    """1 − J or −log J from the token probabilities of a reader with weights.

    Args:
        reader: frozen, with weights; it is no part of this module's parameters.
        prompt: the question that the description answers.
        text: teacher-force the whole description, or its words alone joined by commas.
        form: "linear" 1 − J, "log" −log J.
        views: v shows the reader a x + b, clipped to [0, 1], in place of an image x, a in 1 ± v and b in 0 ± v drawn
            anew for every image and step. An edge map fixes neither the level nor the sign of an image, and a reader
            that has never seen such levels says the same of all of them, with a gradient that leads nowhere; among
            views there are some that it can read.
        seed: of the views, which are the same on any number of ranks and in a resumed run.
    Raises:
        ValueError: a reader without weights.

    Source: views after expectation over transformation, Athalye et al., arXiv 1707.07397.
    """

    def __init__(
        self,
        reader: Reader,
        prompt: str,
        *,
        text: Literal["description", "words"] = "description",
        form: Literal["linear", "log"] = "linear",
        views: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not reader.has_weights:
            raise ValueError(f"{reader.name} gives no token probabilities: set loss.estimator=score")
        self._reader = (reader,)  # in a tuple: readers may be modules, and are not to be trained or saved
        self.prompt, self.text, self.form = prompt, text, form
        self.views, self.seed = views, seed

    def loss(self, images: Tensor, texts: Sequence[str], *, keys: Sequence[str], step: int) -> dict[str, Tensor]:
        """Mean over a batch; one teacher-forced pass.

        Args:
            images: (B, 3, H, W) float in [0, 1], with a graph.
            texts: B descriptions of the paired RGB frames.
            keys: B names of the samples; step: the optimiser step; of both the views are drawn.
        Returns:
            "loss" with a graph to the images, and "jaccard", the mean soft Jaccard: float32 scalars.
        """
        if self.text == "words":
            texts = [", ".join(text[start:end] for _, start, end in word_spans(text)) for text in texts]
        # A description without a word asks nothing of the image, and most readers cannot be made to say nothing.
        asked = [i for i, text in enumerate(texts) if words(text)]
        if not asked:
            return {"loss": images.sum() * 0, "jaccard": images.new_ones(())}
        said = [texts[i] for i in asked]
        seen = self._view(images, keys, step) if self.views else images
        with torch.autocast(images.device.type, enabled=False):  # the reader's precision is its own, as it described
            scores = self._reader[0].token_log_probs(seen[asked], said, self.prompt)
        log_p, rows = _all_words(scores, said)
        hit, count = _per_row(log_p.exp(), rows, len(asked)), _per_row(torch.ones_like(log_p), rows, len(asked))
        extra = count - hit
        values = soft_jaccard(hit, extra, count)
        losses = 1 - values
        if self.form == "log":
            # Of logarithms: a word of several unlikely tokens has a probability of 0 in float32.
            top = torch.full_like(hit, float("-inf")).scatter_reduce(0, rows, log_p.detach(), "amax")
            top = torch.where(count > 0, top, 0)
            log_hit = _per_row((log_p - top[rows]).exp(), rows, len(asked)).clamp_min(1e-30).log() + top
            losses = torch.where(count > 0, (count + extra).log() - log_hit, 0)
        idle = len(texts) - len(asked)
        return {
            "loss": losses.sum().to(images.device) / len(texts),
            "jaccard": (values.detach().sum().to(images.device) + idle) / len(texts),
        }

    def _view(self, images: Tensor, keys: Sequence[str], step: int) -> Tensor:
        """The images at random contrasts and brightnesses."""
        drawn = [torch.rand(2, generator=_generator(self.seed, step, key)) for key in keys]
        contrast, brightness = (self.views * (2 * torch.stack(drawn).to(images.device) - 1)).T[..., None, None, None]
        return ((1 + contrast) * images + brightness).clamp(0, 1)


class ScoreSemantic(nn.Module):
    """1 − J by REINFORCE: the reader's answers about perturbed images, less what a learned baseline expects.

    Args:
        reader: anything that describes.
        prompt: the question.
        samples: K perturbations an image, described in one call.
        sigma: their standard deviation.
        budget: most perturbed images that are shown in a run, over all ranks; 0 = no limit.
        seed: of the perturbations, which also depend on the step and the sample's key and on nothing else: they are the
            same on any number of ranks, and a resumed run asks what it had asked.

    Attributes:
        shown: perturbed images shown so far, over all ranks.

    Source: R. J. Williams, Simple statistical gradient-following algorithms, 1992.
    """

    def __init__(
        self, reader: Reader, prompt: str, *, samples: int = 4, sigma: float = 0.05, budget: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self._reader = (reader,)
        self.prompt, self.samples, self.sigma, self.budget, self.seed = prompt, samples, sigma, budget, seed
        self.shown, self._spent = 0, False
        self.baseline = nn.Linear(3 * _POOL * _POOL, 1)
        nn.init.zeros_(self.baseline.weight)
        nn.init.zeros_(self.baseline.bias)

    def loss(self, images: Tensor, texts: Sequence[str], *, keys: Sequence[str], step: int) -> dict[str, Tensor]:
        """Mean over a batch.

        Args:
            images: (B, 3, H, W) float in [0, 1], with a graph.
            texts: B descriptions of the paired RGB frames.
            keys: B names of the samples.
            step: the optimiser step.
        Returns:
            "loss" whose value is 1 − mean reward and whose gradient to the images is the estimate, "jaccard" the mean
            reward, "baseline" the baseline's own squared error, for its parameters alone. Past the budget "loss" and
            "baseline" are 0 and there is no "jaccard".
        """
        images = images.float()
        expected = self.baseline(F.adaptive_avg_pool2d(images.detach(), _POOL).flatten(1)).float()
        if not self._afford(len(images) * self.samples * distributed.world_size(), step):
            return {"loss": images.sum() * 0, "baseline": expected.sum() * 0}
        noise = self._noise(images, keys, step)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            perturbed = (images[:, None] + self.sigma * noise).flatten(0, 1)
            answers = self._reader[0].describe(perturbed, self.prompt)
        wanted = [words(text) for text in texts for _ in range(self.samples)]
        rewards = torch.tensor([jaccard(words(a), w) for a, w in zip(answers, wanted, strict=True)])
        rewards = rewards.to(images).view(len(images), self.samples)
        # The baseline knows the image, not ε, so that what it takes off has an expectation of 0.
        advantage = (rewards - expected.detach())[..., None, None, None]
        direction = (advantage * noise).mean(dim=1) / self.sigma
        surrogate = (images * direction).sum() / len(images)
        mean = rewards.mean()
        return {
            "loss": 1 - mean - (surrogate - surrogate.detach()),
            "jaccard": mean,
            "baseline": (expected - rewards.mean(dim=1, keepdim=True)).square().mean(),
        }

    def _afford(self, count: int, step: int) -> bool:
        """Counts images about to be shown, or says once that the budget is spent."""
        if self._spent or (self.budget and self.shown + count > self.budget):
            if not self._spent and distributed.is_main():
                print(
                    f"loss.score_budget={self.budget}: {self.shown} images were shown to the reader before step "
                    f"{step + 1}; the semantic term is 0 from here on",
                    file=sys.stderr,
                    flush=True,
                )
            self._spent = True
            return False
        self.shown += count
        return True

    def _noise(self, images: Tensor, keys: Sequence[str], step: int) -> Tensor:
        """(B, K, 3, H, W) standard normal, a function of seed, step and key; drawn on the CPU, alike on any device."""
        draws = []
        for key in keys:
            draws.append(torch.randn((self.samples, *images.shape[1:]), generator=_generator(self.seed, step, key)))
        return torch.stack(draws).to(images.device)


def _generator(seed: int, step: int, key: str) -> torch.Generator:
    """On the CPU, a function of its arguments alone: alike on any device and any rank."""
    digest = hashlib.sha256(f"{seed}/{step}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _tokens_of_words(scores: TokenScores, text: str) -> list[list[int]]:
    """Of each word of the text that any token covers, the places of those tokens."""
    covered = (
        [i for i, (first, last) in enumerate(scores.spans) if first < end and last > start]
        for _, start, end in word_spans(text)
    )
    return [own for own in covered if own]


def _all_words(scores: Sequence[TokenScores], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`word_log_probs` of several texts in one: (W,) values, and int64 (W,) the text that each belongs to."""
    tokens: list[int] = []
    word_of: list[int] = []
    row_of: list[int] = []
    offset = 0
    for row, (score, text) in enumerate(zip(scores, texts, strict=True)):
        for own in _tokens_of_words(score, text):
            tokens += [offset + i for i in own]
            word_of += [len(row_of)] * len(own)
            row_of.append(row)
        offset += len(score.spans)
    flat = torch.cat([score.log_probs for score in scores])
    rows = torch.tensor(row_of, dtype=torch.int64, device=flat.device)
    # A probability of 0 would make the gradient NaN.
    chosen = flat[torch.tensor(tokens, dtype=torch.int64, device=flat.device)].clamp_min(-1e4)
    return _per_row(chosen, torch.tensor(word_of, dtype=torch.int64, device=flat.device), len(row_of)), rows


def _per_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count,) sums of values (n,) by their row int64 (n,)."""
    return values.new_zeros(count).index_add(0, rows, values)
