"""The words of a description: what counts as one, where it stands, and the Jaccard of two sets."""

from __future__ import annotations

import pytest

from downstream.llm_evrep.words import CAPTION_WORDS, STOP_WORDS, jaccard, stem, word_spans, words


@pytest.mark.parametrize(
    "forms, expected",
    [
        ("bench benches", "bench"),
        ("box boxes", "box"),
        ("horse horses", "horse"),
        ("city cities", "city"),
        ("tie ties tied", "tie"),
        ("glass glasses", "glass"),
        ("tomato tomatoes", "tomato"),
        ("shoe shoes", "shoe"),
        ("child children", "child"),
        ("ride rides riding", "ride"),
        ("run runs running", "run"),
        ("stand stands standing", "stand"),
        ("stripe striped stripes", "stripe"),
        ("stop stopped stopping", "stop"),
        ("eat eating", "eat"),
        ("locate located locating", "locate"),
        ("bottle bottles bottled", "bottle"),
        ("cross crosses crossing", "cross"),
        ("fill filled", "fill"),
        ("carry carries carried carrying", "carry"),
        ("dance dancing danced", "dance"),
        ("visit visited visiting", "visit"),
        ("use used using uses", "use"),
        ("building buildings", "build"),
    ],
)
def test_forms_of_a_word_have_one_stem(forms: str, expected: str) -> None:
    assert [stem(form) for form in forms.split()] == [expected] * len(forms.split())
    assert stem(expected) == expected


def test_what_looks_like_an_ending_and_is_none_stays() -> None:
    for word in "string spring king ring thing red bed seed bus tennis octopus glass gas fly 7s 1960s straße".split():
        assert stem(word) == word


def test_words_of_a_caption_by_hand() -> None:
    text = "The image shows two MEN riding horses, and a dog's red ball; they are not riding bikes."
    assert words(text) == {"two", "man", "ride", "horse", "dog", "red", "ball", "not", "bike"}
    assert words("A photo of a sea_horse.") == {"sea", "horse"}
    assert words("") == words("The image is of a… of the!") == frozenset()
    assert not STOP_WORDS & CAPTION_WORDS and all(word == word.lower() for word in STOP_WORDS | CAPTION_WORDS)


def test_any_script_and_any_form_of_a_letter() -> None:
    assert words("Ein Hund läuft") == {"ein", "hund", "läuft"}
    assert words("cafe\u0301") == words("CAFÉ") == {"café"}
    assert words("ﬁve ７") == {"five", "7"}
    assert words("हिन्दी में") == {"हिन्दी", "में"}
    assert words("狗，猫") == {"狗", "猫"}


def test_spans_are_of_the_text_as_it_stands_and_of_first_occurrences() -> None:
    text = "Dogs chase the dog; a ﬁve-year-old Cat\u0301s, ½."
    spans = word_spans(text)
    assert [(word, text[start:end]) for word, start, end in spans] == [
        ("dog", "Dogs"), ("chase", "chase"), ("five", "ﬁve"), ("year", "year"), ("old", "old"),
        ("cat\u0301s", "Cat\u0301s"),
        ("1", "½"), ("2", "½"),
    ]  # fmt: skip
    assert {word for word, _, _ in spans} == words(text)


def test_jaccard_by_hand() -> None:
    a, b = words("a red dog on grass"), words("a brown dog in the grass")
    assert a == {"red", "dog", "grass"} and jaccard(a, b) == jaccard(b, a) == 2 / 4
    assert jaccard(a, a) == 1 and jaccard(a, frozenset()) == 0 and jaccard(frozenset(), frozenset()) == 1


def test_every_number_is_a_word() -> None:
    for number in "zero one two three four five six seven eight nine ten".split():
        assert words(f"The digit in the image is {number}.") == {"digit", number}
