"""The words of a description, as sets that can be compared. Pure functions of the text.

A word is found in four steps:

1. Runs of letters, digits and combining marks of any script are the tokens; everything else separates them (an
   underscore and an apostrophe too). Scripts written without spaces are not cut further.
2. A token is normalised by Unicode's NFKC and lower-cased.
3. English function words (articles, prepositions, pronouns, auxiliaries, conjunctions) and the words in which captions
   speak of themselves ("image", "photo", "shows" …) are left out. Negations stay: they change what is said.
4. Words of the letters a-z alone lose inflections by `stem`. It is a light stemmer of our own: its results need not be
   words, they need only be equal for the forms of one word.
"""

from __future__ import annotations

import re
import unicodedata

STOP_WORDS = frozenset(
    """
    a an the this that these those some any each every either neither both all such same other another
    of in on at by for with from to into onto upon over under about above below behind beside between among through
    during before after against within without toward towards across along around near off out up down as than like
    and or but nor so yet if then while because although though when where which who whom whose what how why
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
    ourselves they them their theirs themselves ones someone something there here
    is are was were be been being am do does did doing done have has had having
    can could will would shall should may might must
    s t d ll m re ve also just only very too more most much many few
    """.split()
)
"""English function words, and what an apostrophe cuts off."""
CAPTION_WORDS = frozenset(
    """
    image images photo photos photograph photographs picture pictures pic scene view depiction
    show shows showing shown depict depicts depicting depicted display displays displaying displayed
    feature features featuring appear appears appearing appeared seem seems seemingly contain contains containing
    see seen visible
    """.split()
)
"""Words in which descriptions speak of themselves; two answers share them whatever the images show."""
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "shelves": "shelf",
    "halves": "half", "lives": "life", "wives": "wife", "loaves": "loaf", "buses": "bus", "shoes": "shoe",
    "toes": "toe", "canoes": "canoe",
    "using": "use", "used": "use",
}  # fmt: skip
_VOWEL = re.compile("[aeiouy]")
_TAIL_NEEDS_E = re.compile("([^aeiou]at|[cvzu]|[^aeiouys]s|[aeiou]{2}s|[bcdfgkptz]l)$")
_SHORT = re.compile("[^aeiou]*[aeiouy][^aeiouwxy]$")


def words(text: str) -> frozenset[str]:
    """The set of words of a text: see the module's four steps.

    Args:
        text: any string.
    Returns:
        Stems, as `word_spans` finds them.
    """
    return frozenset(word for word, _, _ in word_spans(text))


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """The words of a text with the characters of their first occurrence, in order.

    Args:
        text: any string.
    Returns:
        (word, start, end): text[start:end] is the token that the word was made from.
    """
    found: dict[str, tuple[int, int]] = {}
    for start, end in _tokens(text):
        normal = unicodedata.normalize("NFKC", text[start:end]).lower()
        # NFKC may put a separator into a token (a ligature, a fraction): each part is a word of the same characters.
        for first, last in _tokens(normal):
            token = normal[first:last]
            if token not in STOP_WORDS and token not in CAPTION_WORDS:
                found.setdefault(stem(token), (start, end))
    return [(word, start, end) for word, (start, end) in found.items()]


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a ∩ b| / |a ∪ b| in [0, 1]; 1 where both are empty.

    Source: LLM-EvRep, arXiv 2502.14273, Eq. 3 (its loss is 1 minus this).
    """
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def stem(word: str) -> str:
    """A lower-case word without its inflection; words with anything but a-z, or of up to three letters, stay.

    A table of irregular forms; -ies and -ied → y; -es after s, x, z, ch, sh and o, and -s but for -ss, -us, -is; -ing
    and -ed where three letters with a vowel remain, of which a doubled consonant (but l, s, z) becomes single or a lost
    e comes back.
    """
    if not (word.isascii() and word.isalpha()):
        return word
    return _without_ending(_singular(word))


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y" if len(word) > 4 else word[:-1]
    if word.endswith(("sses", "xes", "zzes", "ches", "shes", "oes")):
        return word[:-2]
    return word[:-1]


def _without_ending(word: str) -> str:
    if word.endswith("ing"):
        rest = word[:-3]
    elif word.endswith("ied"):
        return word[:-3] + "y" if len(word) > 4 else word[:-1]
    elif word.endswith("ed") and not word.endswith("eed"):
        rest = word[:-2]
    else:
        return word
    if len(rest) < 3 or not _VOWEL.search(rest):
        return word
    if rest[-1] == rest[-2] and rest[-1] not in "aeioulsz":
        return rest[:-1]
    return rest + "e" if _TAIL_NEEDS_E.search(rest) or _SHORT.fullmatch(rest) else rest


def _tokens(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of runs of letters, digits and the marks that follow them."""
    runs, start = [], -1
    for place, character in enumerate(text + " "):
        inside = character.isalnum() or (start >= 0 and unicodedata.category(character)[0] == "M")
        if inside and start < 0:
            start = place
        elif not inside and start >= 0:
            runs.append((start, place))
            start = -1
    return runs
