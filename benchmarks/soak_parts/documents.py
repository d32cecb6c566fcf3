"""Pseudo-random documents to publish and ask for; some begin as others do."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

WORDS = (
    *("harbour", "ledger", "winter", "engine", "copper", "market", "window", "letter", "garden"),
    *("signal", "bridge", "number", "river", "paper", "morning", "captain", "island", "silver"),
    *("border", "station", "mountain", "forest", "lantern", "village", "cotton", "museum"),
    *("doctor", "pencil", "summer", "kitchen", "bottle", "carpet", "dinner", "orange"),
)
LONGEST = 1300


@dataclass(slots=True)
class Document:
    """One document: tokens, or a text that is published as chat. `id` once it was accepted."""

    title: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    id: str = ""
    publisher: str = ""


def random_tokens(rng: random.Random, count: int) -> list[int]:
    """Token ids far from the special ones."""
    return [rng.randrange(1000, 41_000) for _ in range(count)]


def random_text(rng: random.Random, words: int) -> str:
    """Sentences of common words."""
    sentences = []
    while words > 0:
        length = min(words, rng.randrange(6, 14))
        sentences.append(" ".join(rng.choice(WORDS) for _ in range(length)).capitalize() + ".")
        words -= length
    return " ".join(sentences)


class Library:
    """The documents that publishers and buyers know; a few are replaced by new ones on the way."""

    def __init__(self, seed: int, count: int) -> None:
        self._rng = random.Random(f"library {seed}")
        self._made = 0
        self.documents: list[Document] = []
        for _ in range(count):
            self.documents.append(self._new())

    def pick(self, rng: random.Random, among: set[str] | None = None) -> Document:
        """One of them, or of those whose ids are `among`; the first ones more often than the last.

        One of all where none of them is among those.
        """
        chosen = [each for each in self.documents if among is None or each.id in among]
        chosen = chosen or self.documents
        return chosen[int(len(chosen) * rng.random() ** 1.5)]

    def replace_one(self) -> Document:
        """Put a new document in some old one's place; mutates."""
        place = self._rng.randrange(len(self.documents))
        self.documents[place] = self._new()
        return self.documents[place]

    def _new(self) -> Document:
        rng, self._made = self._rng, self._made + 1
        title = f"document {self._made}"
        kind = rng.random()
        if kind < 0.15:
            return Document(title, text=random_text(rng, rng.randrange(150, 500)))
        before = [each for each in self.documents if each.tokens and len(each.tokens) < 900]
        if kind < 0.4 and before:
            # Shares whole chunks, and the beginning of one, with another document.
            begin = rng.choice(before).tokens
            begin = begin[: rng.randrange(len(begin) // 2, len(begin) + 1)]
            more = rng.randrange(100, LONGEST - len(begin))
            return Document(title, [*begin, *random_tokens(rng, more)])
        return Document(title, random_tokens(rng, rng.randrange(200, LONGEST)))
