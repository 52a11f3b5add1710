"""The question, the rule that maps answers to classes, class names, and bootstrap intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from downstream.llm_evrep.class_names import class_names, first_of_name
from downstream.llm_evrep.intervals import bootstrap, paired_difference
from downstream.llm_evrep.prompts import classification_prompt, parse_answer

DIGITS = [str(digit) for digit in range(10)]
CALTECH = [
    "BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", "cougar_body", "cougar_face", "crab", "crocodile",
    "crocodile_head", "lotus", "octopus", "yin_yang",
]  # fmt: skip
SHARKS = ["white shark", "great white shark, white shark, man-eater", "tiger shark, Galeocerdo cuvieri", "crane", "cab"]


# ---- the question -----------------------------------------------------------------------------------


def test_candidates_are_a_permutation_drawn_by_the_seed() -> None:
    prompts = [classification_prompt(CALTECH, seed=seed, template="<{classes}>") for seed in range(5)]
    listed = [prompt.strip("<>").split(", ") for prompt in prompts]
    expected = sorted(name.replace("_", " ") for name in CALTECH)
    assert all(sorted(names) == expected for names in listed)
    assert len({tuple(names) for names in listed}) == 5, "other seeds, other orders"
    assert prompts[0] == classification_prompt(tuple(CALTECH), seed=0, template="<{classes}>")
    order = np.random.default_rng(3).permutation(len(CALTECH))
    assert listed[3] == [CALTECH[i].replace("_", " ") for i in order]


def test_names_with_commas_are_kept_apart_and_equal_names_are_written_once() -> None:
    prompt = classification_prompt([*SHARKS, "crane"], seed=0, template="{classes}")
    assert sorted(prompt.split("; ")) == sorted(SHARKS)
    # Braces elsewhere in a template are text.
    assert classification_prompt(["a_b"], seed=0, template='{"answer": "{classes}"}') == '{"answer": "a b"}'


@pytest.mark.parametrize(
    "classes, template, message", [([], "{classes}", "class_names"), (["a"], "Which?", "{classes}")]
)
def test_a_question_that_cannot_be_asked(classes: list[str], template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_prompt(classes, seed=0, template=template)


# ---- the rule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("7", "7"),
        ("seven", "7"),
        ("Seven.", "7"),
        ("**7**", "7"),
        ("The image shows the digit 7.", "7"),
        ("７", "7"),  # full width
        ("It is a three, not an eight", "3"),
        ("This is not a 3 but an 8.", "8"),
        ("It isn't a 3. It's an 8.", "8"),
        ("neither 3 nor 8, it's 5", "5"),
        ("3 or 8", "3"),  # the first mention
        ("It is one of the clearest sevens", "7"),
        ("one", "1"),
        ("12", None),
        ("7th", None),
        ("", None),
        ("  \n", None),
        ("I'm sorry, but I can't help with that.", None),
        ("I cannot tell whether it is a 3 or an 8.", None),
        ("I can’t determine if this is a 3", None),
        ("I cannot be sure, but it looks like a 3", "3"),
        ("Unable to determine. My guess is 4.", "4"),
        ("I'm not sure, 6", "6"),
        ("none of 3, 5 and 8", None),
        ("<think>a 3? or an 8?</think>\n\n8", "8"),
        ("The digit is not 3, it is 7", "7"),
        ("7.", "7"),
        ("I cannot tell", None),
        ("It is not the digit 3 but 7", "7"),
        ("It is not a handwritten 3, it is a 7", "7"),
        ("It does not look like a 3, it is a 7", "7"),
        ("I don't think it's a 3. It's an 8.", "8"),
        ("It is not 3 it is 7", "7"),
        ("not 3 or 8, it is 7", "7"),
        ("This is not a 3, or an 8. It is a 5", "5"),
        ("There is no 3, it is 8", "8"),
        ("No, it's 8", "8"),
        ("No. 8", "8"),
        ("Instead of a 3 it is 8", "8"),
        ("This one is a 7", "7"),
        ("The image shows one digit, 7", "7"),
        ("The number in the picture is one.", "1"),
        ("one, not seven", "1"),
        ('not "3" but "7"', "7"),
        ("<think>It could be a 3, or", None),
        ("zero", "0"),
        ("0️⃣", "0"),
    ],
)
def test_digits(text: str, expected: str | None) -> None:
    assert parse_answer(text, DIGITS) == (-1 if expected is None else DIGITS.index(expected))


def test_digit_words_as_class_names_are_said_in_figures_too() -> None:
    assert parse_answer("It shows a 7", ["six", "seven"]) == 1
    assert parse_answer("3-toed sloth", ["ai", "three-toed sloth"]) == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("BACKGROUND_Google", "BACKGROUND_Google"),
        ("background google", "BACKGROUND_Google"),
        ("Background", None),
        ("Faces easy", "Faces_easy"),
        ("faces_easy", "Faces_easy"),
        ("a face", "Faces"),
        ("two faces", "Faces"),
        ("cougar face", "cougar_face"),  # not "Faces"
        ("the face of a cougar", "Faces"),
        ("an airplane in the sky", "airplanes"),
        ("crocodile", "crocodile"),
        ("A crocodile's head", "crocodile"),
        ("crocodile head.", "crocodile_head"),
        ("crabs", "crab"),
        ("a lotus", "lotus"),
        ("Yin-Yang symbol", "yin_yang"),
        ("a crabby mood", None),
        ("a dog", None),
    ],
)
def test_names_with_underscores_plurals_and_parts(text: str, expected: str | None) -> None:
    assert parse_answer(text, CALTECH) == (-1 if expected is None else CALTECH.index(expected))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("great white shark", 1),  # longer than class 0's name, which it holds
        ("great white shark, white shark, man-eater", 1),
        ("a white shark", 0),  # written so in both: the class of that whole name
        ("maneater", -1),
        ("man-eater", 1),
        ("Galeocerdo cuvieri", 2),
        ("A tiger shark, maybe a great white shark", 2),
        ("a crane lifting a cab", 3),
        ("cabbage", -1),
    ],
)
def test_imagenet_like_names(text: str, expected: int) -> None:
    assert parse_answer(text, SHARKS) == expected


def test_the_longest_of_overlapping_mentions_counts_wherever_it_begins() -> None:
    assert parse_answer("a sea lion fish tank", ["sea lion", "lion fish tank", "tank"]) == 1
    assert parse_answer("tank, sea lion", ["sea lion", "lion fish tank", "tank"]) == 2
    # The singular of one class is the name of another: what is written wins.
    assert parse_answer("glasses", ["glass", "glasses"]) == 1
    assert parse_answer("glass", ["glasses", "glass"]) == 1
    assert parse_answer("crane", ["crane", "crane"]) == 0
    assert parse_answer("anything", []) == -1


def test_every_name_of_imagenet_is_parsed_as_itself() -> None:
    names = class_names(["n01440764", "n01484850", "n02012849", "n03126707", "n04008634", "n03773504"], "imagenet")
    assert names[:4] == ("tench", "great white shark", "crane bird", "construction crane")
    assert names[4] == names[5] == "missile" and first_of_name(names) == [0, 1, 2, 3, 4, 4]
    assert [parse_answer(f"It is a {name}.", names) for name in names] == [0, 1, 2, 3, 4, 4]


# ---- names ------------------------------------------------------------------------------------------


def test_names_from_the_set_and_from_files(tmp_path: Path) -> None:
    assert class_names(["Faces_easy", "crab"]) == ("Faces easy", "crab")
    mapping = tmp_path / "mapping.txt"
    mapping.write_text("n02 hen\nn01 tench, Tinca tinca\nn03 drake\n")
    assert class_names(["n01", "n02"], str(mapping)) == ("tench, Tinca tinca", "hen")
    plain = tmp_path / "plain.txt"
    plain.write_text("great fish\nhen\n\n")
    assert class_names(["n01", "n02"], str(plain)) == ("great fish", "hen")
    with pytest.raises(ValueError, match=r"no name for 1 of 3 classes, such as 'n09'"):
        class_names(["n01", "n02", "n09"], str(mapping))
    with pytest.raises(ValueError, match="2 lines for 3 classes"):
        class_names(["n01", "n02", "n09"], str(plain))
    with pytest.raises(ValueError, match="no name for 1 of 1 classes, such as 'cat'"):
        class_names(["cat"], "imagenet")
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        class_names(["cat"], str(tmp_path / "nowhere.txt"))


# ---- intervals --------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_a_loop_and_with_the_normal_interval() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    rng = np.random.default_rng(4)
    means = sorted(np.mean([values[i] for i in draw]) for draw in rng.integers(5, size=(301, 5)))
    found = bootstrap(values, draws=301, level=0.9, seed=4)
    # 300 steps between 301 means: 5 % and 95 % are the 15th and the 285th.
    assert found == pytest.approx((0.6, means[15], means[285]))
    right = np.random.default_rng(0).random(2000) < 0.3
    low, high = bootstrap(right, draws=4000)[1:]
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert (low, high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.002)
    assert (
        bootstrap(right, draws=50, seed=1) == bootstrap(right, draws=50, seed=1) != bootstrap(right, draws=50, seed=2)
    )


def test_bootstrap_draws_in_pieces_of_any_size_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(30)
    whole = bootstrap(values, draws=101, seed=3)
    monkeypatch.setattr("downstream.llm_evrep.intervals._AT_ONCE", 100)
    assert bootstrap(values, draws=101, seed=3) == whole


def test_a_difference_of_pairs_is_surer_than_either() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5
    better = hard | (rng.random(500) < 0.1)
    found = paired_difference(better, hard, seed=1)
    assert found.mean == pytest.approx(better.mean() - hard.mean()) and found.low > 0
    alone = bootstrap(better, seed=1)
    assert found.high - found.low < 0.7 * (alone.high - alone.low)
    assert paired_difference(hard, hard) == (0, 0, 0)


def test_bootstrap_of_nothing_and_of_nonsense() -> None:
    assert np.isnan(bootstrap([])).all()
    assert bootstrap([1, 1, 1]) == (1, 1, 1)
    for call in (
        lambda: bootstrap([1.0], draws=0),
        lambda: bootstrap([1.0], level=95),
        lambda: bootstrap([np.nan]),
        lambda: paired_difference([1, 2], [1]),
    ):
        with pytest.raises(ValueError, match="bootstrap|paired_difference"):
            call()
