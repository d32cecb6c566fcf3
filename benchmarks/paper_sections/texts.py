"""Documents of four kinds, cut from texts that every machine with this environment has.

English prose is Python's language reference and a licence, code is Python's standard library, JSON
is data files of installed packages, and other languages are translated manual pages. Where a
machine has no translated page, German sentences are generated instead, and the source says so.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

MANUALS = Path("/usr/share/man")
LANGUAGES = ("de", "fr", "ja", "es", "ru", "pl", "it", "nl", "pt_BR", "zh_CN")
MODULES = ("argparse", "_pydecimal", "ast", "mailbox", "typing", "tarfile")
TOPICS = ("specialnames", "types", "debugger", "attribute-access", "compound")
# Lengths in tokens: from 200 to 4,000, most of them at no block's boundary.
LENGTHS = {
    "prose": (200, 437, 811, 2048, 4000),
    "code": (255, 512, 700, 1000, 1536),
    "json": (230, 384, 640, 896, 1300),
    "other language": (300, 450, 777, 1100, 1900),
}
# They differ in their first token, so that no question lengthens another one's prefix-cache hit.
QUESTIONS = (
    "\n\nQuestion: What is the text above about?\nAnswer:",
    "---\nSummary of the text above, in one sentence:",
    " [...]\nThe most important word of the text above is",
)


@dataclass(frozen=True, slots=True)
class Source:
    """A text and where it was found."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """A kind, the source's name, and tokens."""

    kind: str
    source: str
    tokens: tuple[int, ...]


def prose() -> Iterator[Source]:
    """Python's language reference, and this package's licence text."""
    from pydoc_data.topics import topics

    licence = resources.files("vllm_kvmarket.cli").joinpath("gpl-3.0.txt").read_text("utf-8")
    for name in TOPICS[:-1]:
        if name in topics:
            yield Source(f"Python reference: {name}", topics[name])
    yield Source("GPL 3", licence)


def code() -> Iterator[Source]:
    """Modules of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        path = folder / f"{name}.py"
        if path.is_file():
            yield Source(f"stdlib {path.name}", path.read_text("utf-8"))


def json_files(least: int = 8_000, most: int = 1_000_000) -> Iterator[Source]:
    """The largest JSON file of each installed package, within bounds in bytes, as it lies there.

    Bills of materials are left out: many packages have one, and they are all alike.
    """
    for distribution in sorted(metadata.distributions(), key=lambda each: each.metadata["Name"]):
        found = [
            (path.stat().st_size, path)
            for file in distribution.files or ()
            if file.suffix == ".json"
            and "sboms" not in file.parts
            and (path := Path(str(distribution.locate_file(file)))).is_file()
        ]
        fitting = [each for each in found if least <= each[0] <= most]
        if fitting:
            path = max(fitting)[1]
            text = path.read_text("utf-8")
            json.loads(text)
            yield Source(f"{distribution.metadata['Name']}: {path.name}", text)


def plain_manual(roff: str) -> str:
    """A manual page's text without its markup, near enough: requests, fonts and escapes go."""
    lines = []
    for line in roff.splitlines():
        words = line
        if line.startswith((".", "'")):
            request, _, words = line.partition(" ")
            if request not in (".SH", ".SS", ".B", ".I", ".BR", ".IR", ".RB", ".RI", ".TP"):
                continue
        words = re.sub(r"\\f(\[\w*\]|\(..|.)|\\&|\\[*]\[\w*\]|\\\|", "", words)
        lines.append(words.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\"))
    return "\n".join(lines)


def translations(manuals: Path = MANUALS, least: int = 6_000) -> Iterator[Source]:
    """The longest translated manual page of each language that has one, a page only once.

    Parts that were left in English make a page's share of letters beyond ASCII small; it is passed.
    """
    taken: set[str] = set()
    for language in LANGUAGES:
        pages = {page.resolve() for page in (manuals / language).glob("man*/*.gz")}
        for page in sorted(pages, key=lambda page: (-page.stat().st_size, page.name)):
            text = plain_manual(gzip.decompress(page.read_bytes()).decode("utf-8", "replace"))
            foreign = sum(letter > "\x7f" and letter.isalpha() for letter in text)
            if page.name not in taken and len(text) >= least and foreign >= 0.01 * len(text):
                taken.add(page.name)
                yield Source(f"manual page {language}: {page.name.removesuffix('.gz')}", text)
                break


def generated(seed: int, sentences: int = 1500) -> Source:
    """German sentences from a small grammar: what is left where no translated text is found."""
    rng = random.Random(seed)
    who = ("Der Verlag", "Die Bibliothek", "Ein Händler", "Die Leserin", "Unser Nachbar", "Niemand")
    does = ("verkauft", "liest", "übersetzt", "vergisst", "prüft", "verschenkt", "speichert")
    what = ("das Wörterbuch", "den Fahrplan", "ein Gesetz", "die Anleitung", "jeden Brief")
    when = ("am Abend", "im März", "ohne Eile", "vor der Prüfung", "seit Jahren", "für 3,50 Euro")
    text = " ".join(
        f"{rng.choice(who)} {rng.choice(does)} {rng.choice(when)} {rng.choice(what)}."
        for _ in range(sentences)
    )
    return Source("generated German sentences (no translated text on this machine)", text)


KINDS: dict[str, Callable[[], Iterator[Source]]] = {
    "prose": prose,
    "code": code,
    "json": json_files,
    "other language": translations,
}


def sources(kind: str, seed: int) -> list[Source]:
    """All texts of a kind. Raises LookupError naming what is missing on this machine."""
    found = list(KINDS[kind]())
    if not found and kind == "other language":
        return [generated(seed)]
    if not found:
        raise LookupError(
            f"no text of kind {kind!r} on this machine: Python without its standard library's "
            "sources, or an environment without packages that hold JSON files"
        )
    return found


def documents(
    tokenizer: Any, seed: int, lengths: dict[str, Sequence[int]] | None = None
) -> list[Document]:
    """Documents of every kind and length, each from another source while there are enough.

    A document begins at a random token of its text; a text that is too short is followed by the
    next of its kind. Raises LookupError when all texts of a kind together are too short.
    """
    rng = random.Random(seed)
    made = []
    for kind, wanted in (lengths or LENGTHS).items():
        texts = sources(kind, seed)
        for number, length in enumerate(wanted):
            first = texts[number % len(texts)]
            tokens: list[int] = []
            for step in range(len(texts)):
                tokens += tokenizer(texts[(number + step) % len(texts)].text)["input_ids"]
                if len(tokens) >= length + 1:
                    break
            else:
                raise LookupError(f"the texts of kind {kind!r} have only {len(tokens)} tokens")
            start = rng.randrange(len(tokens) - length)
            made.append(Document(kind, first.name, tuple(tokens[start : start + length])))
    return made


def questions(tokenizer: Any) -> list[list[int]]:
    """The questions' tokens. Raises ValueError when two begin alike in this vocabulary."""
    asked = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in QUESTIONS]
    if len({tokens[0] for tokens in asked}) < len(asked):
        raise ValueError("two questions begin with the same token; their hits would differ")
    return asked
