"""The benchmark of the paper's claims: how it finds texts, compares answers, measures codecs."""

import gzip
import os

import numpy as np
import pytest

from benchmarks.paper_sections import clocks, exactness, incompressible, texts, traces
from benchmarks.paper_sections.traces import Divergence, Trace, compare, is_explained


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [sum(word.encode()) for word in text.split()]}


def answer(tokens, *steps):
    return Trace(tuple(tokens), tuple(dict(step) for step in steps))


def test_every_kind_of_text_is_on_this_machine():
    """Prose, code and JSON come with Python and its packages; translations or their substitute."""
    for kind in texts.KINDS:
        found = texts.sources(kind, seed=0)
        assert found
        assert all(len(source.text) > 1000 for source in found)
        assert len({source.name for source in found}) == len(found)


def test_documents_have_their_lengths_and_depend_on_the_seed_only():
    """Same seed, same documents; each kind is there; another seed cuts elsewhere."""
    lengths = {"prose": (50, 200), "code": (75,)}
    made = texts.documents(Words(), 3, lengths)
    assert [(each.kind, len(each.tokens)) for each in made] == [
        ("prose", 50),
        ("prose", 200),
        ("code", 75),
    ]
    assert made == texts.documents(Words(), 3, lengths)
    assert made != texts.documents(Words(), 4, lengths)
    assert len({each.source for each in made}) == 3


def test_texts_that_are_too_short_are_an_error_that_says_so():
    """Not a shorter document."""
    with pytest.raises(LookupError, match="only"):
        texts.documents(Words(), 0, {"prose": (10**7,)})


def test_the_twenty_documents_are_what_the_claim_asks_for():
    """Four kinds, at least 20 documents, from 200 to 4,000 tokens."""
    every = [length for lengths in texts.LENGTHS.values() for length in lengths]
    assert set(texts.LENGTHS) == set(texts.KINDS)
    assert len(every) >= 20
    assert (min(every), max(every)) == (200, 4000)


def test_questions_that_begin_alike_are_refused():
    """One would lengthen the other's prefix-cache hit."""

    class First:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1, len(text)]}

    with pytest.raises(ValueError, match="begin"):
        texts.questions(First())
    assert len(texts.questions(Words())) == 3


def test_translated_manuals_are_found_and_english_ones_passed(tmp_path):
    """The longest page of a language that is in that language; a page's name once."""
    line = ".B Größe\nDie \\fBGröße\\fR der Bücher wächst \\- überall.\n"
    for name, content in {
        "de/man1/a.1.gz": line * 300,
        "de/man1/english.1.gz": "All in English here.\n" * 1000,
        "fr/man1/a.1.gz": line * 300,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()))
    (found,) = texts.translations(tmp_path)
    assert found.name == "manual page de: a.1"
    assert "\\" not in found.text
    assert "Die Größe der Bücher" in found.text


def test_a_machine_without_translations_generates_and_says_so(monkeypatch):
    """German sentences, the same for a seed."""
    monkeypatch.setitem(texts.KINDS, "other language", lambda: iter(()))
    (found,) = texts.sources("other language", seed=1)
    assert "generated" in found.name
    assert found == texts.generated(1) != texts.generated(2)
    monkeypatch.setitem(texts.KINDS, "json", lambda: iter(()))
    with pytest.raises(LookupError, match="'json'"):
        texts.sources("json", seed=1)


def test_equal_answers_are_identical_only_to_the_last_bit():
    """A log-probability that differs is a difference, however small; tokens stay equal."""
    first = answer([5, 6], {5: -0.1, 6: -2.0}, {6: -0.2})
    same = compare(first, answer([5, 6], {5: -0.1, 6: -2.0}, {6: -0.2}))
    assert (same.equal, same.difference, same.is_identical) == (2, 0.0, True)
    assert first.mean_logprob == pytest.approx(-0.15)
    near = compare(first, answer([5, 6], {5: -0.1, 6: -2.0 + 1e-12}, {6: -0.2}))
    assert near.equal == 2
    assert 0 < near.difference < 1e-11
    assert not near.is_identical
    assert near.divergence is None


def test_a_divergence_names_step_tokens_and_gap_and_ends_the_comparison():
    """Later tokens answer another prompt, and are not compared."""
    first = answer([5, 6, 7], {5: -0.1}, {6: -1.0, 8: -1.25}, {7: -0.1})
    second = answer([5, 8, 7], {5: -0.1}, {6: -1.3, 8: -1.2}, {7: -9.0})
    found = compare(first, second)
    assert found.equal == 1
    assert found.difference == pytest.approx(0.3)
    assert found.divergence == Divergence(step=1, tokens=(6, 8), gap=0.25)
    other = answer([5, 99, 7], {5: -0.1}, {99: -0.1}, {7: -0.1})
    assert compare(first, other).divergence.gap is None


@pytest.mark.parametrize(("gap", "explained"), [(1e-5, True), (3e-5, False), (None, False)])
def test_noise_explains_near_ties_only(gap, explained):
    """Two log-probabilities that move by 1e-5 close a gap of 2e-5 at most."""
    assert is_explained(Divergence(0, (1, 2), gap), noise=1e-5) is explained


def test_a_mismatch_where_both_compute_the_same_tokens_is_never_explained():
    """Nor is one beyond vLLM's own noise; both are listed, and counted as unexplained."""
    same = traces.Comparison(24, 1e-5, is_identical=False)
    noisy = traces.Comparison(3, 1e-5, False, Divergence(3, (1, 2), 1e-6))
    far = traces.Comparison(3, 0.5, False, Divergence(3, (1, 2), 0.5))
    alike = traces.Comparison(24, 0.0, is_identical=True)
    summary = exactness.summarise(
        [
            exactness.Case(0, 0, noisy, same, same, noisy, -1.0),
            exactness.Case(0, 1, far, same, same, alike, -1.0),
        ]
    )
    assert summary["all_tokens_as_full_prefill"] == 0
    assert summary["all_tokens_as_hit"] == 2
    assert summary["bit_for_bit_as_hit"] == 1
    verdicts = [(each["between"], each["explained"]) for each in summary["mismatches"]]
    assert verdicts == [("full_reuse", True), ("cut", False), ("full_reuse", False)]
    assert len(exactness.unexplained(summary)) == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_codec_gives_back_what_it_was_given(dtype):
    """All are exact, on numbers and on random bits; random bits do not get smaller."""
    rng = np.random.default_rng(0)
    size = incompressible.ITEM_BYTES[dtype]
    numbers = rng.normal(size=(4, 2048)).astype(dtype).view(np.uint8)
    noise = rng.integers(0, 256, (4, 2048 * size), dtype=np.uint8)
    for codec in incompressible.codecs_for(dtype, 2048 * size):
        found = incompressible.measure(codec, [numbers], 1)
        assert found["measured_bytes"] == numbers.nbytes
        assert found["ratio"] > 0.98
        assert 0.98 < incompressible.measure(codec, [noise], 1)["ratio"] <= 1.0


def test_a_codec_that_loses_a_bit_is_found_out():
    """The benchmark does not report its ratio."""
    broken = incompressible.Codec(
        "broken", np.ravel, lambda stored, place: np.copyto(place.reshape(-1), stored & 0xFE)
    )
    with pytest.raises(RuntimeError, match="broken"):
        incompressible.measure(broken, [np.full((1, 64), 255, np.uint8)], 1)


def test_shuffling_is_undone():
    """Bytes of one place come together, and apart again."""
    layer = np.arange(24, dtype=np.uint8).reshape(2, 12)
    mixed = incompressible.shuffle(layer, 4)
    assert mixed[:6].tolist() == [0, 4, 8, 12, 16, 20]
    place = np.zeros_like(layer)
    incompressible.unshuffle(mixed, place, 4)
    assert np.array_equal(place, layer)


def test_fields_of_a_number_hold_the_information_that_they_hold():
    """Powers of two have no mantissa; random words have all of it."""
    powers = np.exp2(np.tile(np.arange(8), 512)).astype(np.float16).view(np.uint8)
    found = incompressible.field_entropies([powers], "float16")
    assert found == {"sign": 0.0, "exponent": pytest.approx(3.0), "mantissa": 0.0}
    words = np.random.default_rng(0).integers(0, 2**16, 2**20).astype("<u2").view(np.uint8)
    noise = incompressible.field_entropies([words], "float16")
    assert [round(bits, 2) for bits in noise.values()] == [1.0, 5.0, 10.0]


def test_the_engines_clock_counts_cpu_and_not_waiting():
    """It moves with work, and hardly with sleep; a process that is not there is an error."""
    import time

    clock = clocks.EngineClock()
    before, own = clock.seconds(), time.process_time()
    while time.process_time() - own < 0.05:
        pass
    worked = clock.seconds() - before
    assert worked >= 0.05
    with pytest.raises(OSError, match=os.strerror(3)):
        clocks._clock_of(2**22 + 1)
