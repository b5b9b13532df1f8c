"""Text to model: written by small grammars of known entropy, or Python's manual."""

import bisect
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from metaopt import validate

TRAIN, HELD_OUT = 200_000, 20_000  # characters of a generated text

LETTERS = "abcdefghijklmno "
OPENING, CLOSING = "([{<", ")]}>"
MAX_DEPTH = 8
OPERANDS = 100


class Text(NamedTuple):
    """The three parts of a text, as positions in its alphabet, `[N]` uint8 each."""

    train: np.ndarray | jax.Array
    valid: np.ndarray | jax.Array
    test: np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text that can be loaded.

    Attributes:
        alphabet: its characters.
        load: returns the three parts.
        entropy: of a character given all before it, in nats, on average; None if it
            is not known. No model's expected loss is lower.
    """

    alphabet: str
    load: Callable[[], tuple[str, str, str]]
    entropy: float | None = None


@functools.cache
def transitions() -> np.ndarray:
    """Returns the Markov chain of the corpus "markov", `[16, 16, 16]`.

    The probability of a letter (last axis) after any two others.
    """
    # Of the standard library's generators only `random()` promises to stay the same.
    source = random.Random("transitions")
    count = len(LETTERS) ** 3
    odds = np.array([-math.log(1.0 - source.random()) for _ in range(count)]) ** 3
    odds = odds.reshape(-1, len(LETTERS), len(LETTERS))
    return odds / odds.sum(axis=-1, keepdims=True)


def markov_entropy() -> float:
    """Computes the entropy rate of `transitions`, in nats per character."""
    p = transitions()
    pair = np.full(p.shape[:2], 1.0 / p.shape[0] ** 2)
    for _ in range(1000):
        pair = np.einsum("ij,ijk->jk", pair, p)
    return -float(np.sum(pair[..., None] * p * np.log(p)))


def _markov(source: random.Random) -> Iterator[str]:
    sums = np.cumsum(transitions(), axis=-1)
    sums[..., -1] = 1.0
    rows = sums.tolist()
    before, last = 0, 0
    while True:
        before, last = last, bisect.bisect(rows[before][last], source.random())
        yield LETTERS[last]


def brackets_entropy() -> float:
    """Computes the entropy of a bracket given all before it, in nats.

    At depth 0 only the kind is free, at the maximal depth nothing is, in between a
    fair coin decides between closing and opening and the kind is free if it opens.
    In the long run the two ends have half the probability of every depth in between.
    """
    kind = math.log(len(OPENING))
    end, between = 1.0 / (2 * MAX_DEPTH), 1.0 / MAX_DEPTH
    return end * kind + (MAX_DEPTH - 1) * between * (math.log(2.0) + kind / 2.0)


def _brackets(source: random.Random) -> Iterator[str]:
    stack: list[int] = []
    while True:
        opens = not stack or (len(stack) < MAX_DEPTH and source.random() < 0.5)
        if opens:
            stack.append(int(source.random() * len(OPENING)))
            yield OPENING[stack[-1]]
        else:
            yield CLOSING[stack.pop()]


def _arithmetic(source: random.Random) -> Iterator[str]:
    while True:
        a, b = (int(source.random() * OPERANDS) for _ in range(2))
        yield from f"{a:02}+{b:02}={a + b:03}\n"


def _generated(
    write: Callable[[random.Random], Iterator[str]],
) -> Callable[[], tuple[str, str, str]]:
    def load():
        draw = lambda seed, n: "".join(itertools.islice(write(random.Random(seed)), n))
        return draw("train", TRAIN), draw("valid", HELD_OUT), draw("test", HELD_OUT)

    return load


PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))


def _manual() -> tuple[str, str, str]:
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    text = "".join(c if c in PRINTABLE else "?" for c in text)
    held_out = len(text) // 20
    return (
        text[: -2 * held_out],
        text[-2 * held_out : -held_out],
        text[-held_out:],
    )


def load(name: str) -> Text:
    """Loads a text.

    Args:
        name: a key of `CORPORA`.

    Raises:
        ValueError: if there is no text of this name.

    >>> train = load("arithmetic").train
    >>> "".join(CORPORA["arithmetic"].alphabet[i] for i in train[:20]).splitlines()
    ['09+60=069', '51+74=125']
    """
    validate.one_of("corpus", name, CORPORA)
    corpus = CORPORA[name]
    code = np.zeros(128, np.uint8)
    code[[ord(c) for c in corpus.alphabet]] = np.arange(len(corpus.alphabet))
    parts = (np.frombuffer(part.encode("ascii"), np.uint8) for part in corpus.load())
    return Text(*(code[part] for part in parts))


# "arithmetic": lines such as "07+85=092". Operands are uniform, the sum follows.
# "brackets": four kinds of brackets, nested at most eight deep, which close correctly.
# "markov": a chain in which every letter depends on the two before it.
# "python-manual": the help texts that come with Python, about half a million
#     characters of English and code; they differ between Python versions.
CORPORA: dict[str, Corpus] = {
    "arithmetic": Corpus(
        "0123456789+=\n", _generated(_arithmetic), 2 * math.log(OPERANDS) / 10
    ),
    "brackets": Corpus(OPENING + CLOSING, _generated(_brackets), brackets_entropy()),
    "markov": Corpus(LETTERS, _generated(_markov), markov_entropy()),
    "python-manual": Corpus(PRINTABLE, _manual),
}
