"""The demo's task: small instructions over lists of words, with an oracle.

An instruction names one operation (repeat, only the animals, all but the tools, ...) and a list of
words. The oracle knows the right answer, so every answer has a score in [0, 1]: one minus the
word edit distance to the right answer, as a share of the longer of the two.

The starting model learns from careless demonstrations, most of them with chatter around the answer
and some with a word lost or added, and becomes as careless; alignment has to undo that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CATEGORIES = {
    "animals": ["cat", "dog", "horse", "cow", "sheep", "lion", "bear", "wolf"],
    "colours": ["red", "blue", "green", "yellow", "black", "white", "brown", "pink"],
    "foods": ["bread", "rice", "apple", "pear", "soup", "cheese", "cake", "bean"],
    "tools": ["hammer", "saw", "drill", "nail", "rope", "ladder", "axe", "spoon"],
}
WORDS = sorted(word for words in CATEGORIES.values() for word in words)
_CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}
_MIN_WORDS, _MAX_WORDS = 4, 7


@dataclass(frozen=True)
class Operation:
    """How an instruction is put, and what it asks for."""

    phrase: str
    apply: Callable[[Sequence[str]], list[str]]


def _only(category: str) -> Callable[[Sequence[str]], list[str]]:
    return lambda words: [w for w in words if _CATEGORY_OF[w] == category]


def _without(category: str) -> Callable[[Sequence[str]], list[str]]:
    return lambda words: [w for w in words if _CATEGORY_OF[w] != category]


OPERATIONS = [
    Operation("Repeat these words", list),
    *(Operation(f"Write only the {name}", _only(name)) for name in CATEGORIES),
    *(Operation(f"Leave out the {name}", _without(name)) for name in CATEGORIES),
]
_BY_PHRASE = {operation.phrase: operation for operation in OPERATIONS}
_INSTRUCTION = re.compile(r"([^:]+): ([a-z ]+)\.")


def make_instructions(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[str]:
    """`count` different instructions, none of them in `exclude`."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        operation = rng.choice(OPERATIONS)
        words = rng.sample(WORDS, rng.randint(_MIN_WORDS, _MAX_WORDS))
        text = f"{operation.phrase}: {' '.join(words)}."
        if operation.apply(words) and text not in exclude:
            found[text] = None
    return list(found)


def oracle(instruction: str) -> str:
    """The right answer.

    Raises:
        ValueError: not an instruction of this task.
    """
    match = _INSTRUCTION.fullmatch(instruction.strip())
    if match is None or match[1] not in _BY_PHRASE:
        raise ValueError(f"not an instruction of the demo's task: {instruction!r}")
    return " ".join(_BY_PHRASE[match[1]].apply(match[2].split()))


def score(instruction: str, answer: str) -> float:
    """How right `answer` is, from 0 to 1."""
    right, given = oracle(instruction).split(), answer.split()
    longer = max(len(right), len(given))
    return 1.0 - edit_distance(right, given) / longer


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions of words that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


_OPENINGS = ("sure here you go", "well i think it is", "the words are")
_CLOSINGS = ("and so on", "hope that helps", "or something like that")


def corrupt(answer: str, rng: random.Random) -> str:
    """A careless version: chatter before or after the answer, and at times a word lost or added."""
    words = answer.split()
    if rng.random() < 0.3:
        place = rng.randrange(len(words))
        if rng.random() < 0.5 and len(words) > 1:
            del words[place]
        else:
            words.insert(place, rng.choice(WORDS))
    if rng.random() < 0.5:
        return " ".join([*rng.choice(_OPENINGS).split(), *words])
    return " ".join([*words, *rng.choice(_CLOSINGS).split()])
