"""The codecs on a stored document: ratio and speed, and which codec pays where."""

import itertools
import json
import math

import numpy as np
import pytest

from benchmarks.codecs import SAMPLE_BYTES, Speeds, main, report_on, winners
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import NotFoundError, StoreError
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import ROOT, pack_tokens
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store import ChunkLayout, LayerLayout

NAMESPACE = bytes(range(32))
RAW = Speeds("raw", 1.0, 1e12, 10e9)
ZSTD = Speeds("zstd-exponent", 1.5, 1e9, 1.5e9)


@pytest.fixture
def market(tmp_path):
    """A market with one document of two chunks of bfloat16 numbers, in two layers."""
    layout = ChunkLayout(
        "test", "bfloat16", 16, tuple(LayerLayout(f"l{i}", (2048,), 4096) for i in range(2))
    )
    tokens = list(range(512))
    chunks = DocumentChunks.of(NAMESPACE, tokens, 256)
    keys = chunks.keys
    numbers = np.random.default_rng(0).standard_normal(16 * 2048).astype(np.float32)
    pages = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    with Market.open(tmp_path / "home") as market:
        market.catalogue.begin(Listing.of(chunks, ListingTerms(title="numbers")), chunks)
        for number, key in enumerate(keys):
            market.store.put(
                key=key,
                parent=keys[number - 1] if number else ROOT,
                namespace=NAMESPACE,
                tokens=pack_tokens(tokens[256 * number : 256 * (number + 1)]),
                layout=layout,
                layers=[[pages], [pages]],
            )
        market.catalogue.commit(chunks.document_id, 4 * pages.nbytes)
        yield market


@pytest.fixture
def document(market):
    """The document's id."""
    (listing,) = market.catalogue.listings()
    return listing.document_id


def test_ratio_and_speed_of_every_codec(market, document, capsys):
    """Each codec has a ratio and speeds, measured on the document's own pages."""
    assert main([document, "--home", str(market.home), "--threads", "3", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["document_id"], measured["tokens"]) == (document, 512)
    assert (measured["dtype"], measured["threads"]) == ("bfloat16", 3)
    assert measured["sampled_bytes"] == 2 * 2 * 16 * 4096
    raw, zstd = measured["codecs"]
    assert (raw["codec"], raw["ratio"], raw["encode_bytes_per_s"]) == ("raw", 1.0, None)
    assert zstd["codec"] == "zstd-exponent"
    assert 1.4 < zstd["ratio"] < 1.6
    assert min(raw["decode_bytes_per_s"], zstd["decode_bytes_per_s"]) > 0
    assert zstd["encode_bytes_per_s"] > 0
    won = measured["winners"]
    assert (won[0]["from_bytes_per_s"], won[0]["codec"]) == (0, "zstd-exponent")
    assert won[-1]["to_bytes_per_s"] is None


def test_the_table_says_where_each_codec_pays(market, document, capsys):
    """The table names the codecs; a line each says from which source which of them is fastest."""
    main([document, "--home", str(market.home)])
    shown = capsys.readouterr().out
    assert "512 tokens of bfloat16" in shown
    assert "raw " in shown
    assert "zstd-exponent loads fastest from a source of 0.00 GB/s up to " in shown


def test_a_sample_is_bounded(market, document):
    """No more pages are taken into memory than the sample's bytes, but one layer at least."""
    for limit, expected in ((1, 65536), (65536, 65536), (200_000, 196_608)):
        assert report_on(market, document, 1, limit)["sampled_bytes"] == expected


def test_what_cannot_be_measured(market, document):
    """An unknown document, and one whose chunks are gone, are errors with a remedy."""
    with pytest.raises(NotFoundError, match="kvd_"):
        report_on(market, "kvd_" + "0" * 32, 1, SAMPLE_BYTES)
    for key in list(market.store.disk.keys()):
        market.store.disk.delete(key)
    with pytest.raises(StoreError, match="publish it again"):
        report_on(market, document, 1, SAMPLE_BYTES)


def test_a_codec_wins_below_what_its_threads_decode():
    """Up to threads x decode the smaller bytes come sooner; above, plain ones do."""
    assert winners([RAW, ZSTD], 1) == [(0.0, 1.5e9, "zstd-exponent"), (1.5e9, math.inf, "raw")]
    assert winners([RAW, ZSTD], 4)[0][1] == 6e9
    useless = Speeds("zstd-exponent", 1.0, 1e9, 1e9)
    assert winners([RAW, useless], 2) == [(0.0, math.inf, "raw")]
    faster = Speeds("zstd-exponent", 1.5, 1e9, 11e9)
    assert winners([RAW, faster], 2) == [(0.0, math.inf, "zstd-exponent")]


def test_ranges_agree_with_the_rates():
    """At any speed of the source the range's codec is the one with the highest rate."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        measured = [
            Speeds(name, ratio, 1.0, speed)
            for name, ratio, speed in zip("abc", 1 + rng.random(3), rng.random(3), strict=True)
        ]
        ranges = winners(measured, 2)
        assert ranges[0][0] == 0.0
        assert all(a[1] == b[0] and a[2] != b[2] for a, b in itertools.pairwise(ranges))
        for source in rng.random(20) * 3:
            rates = {each.codec: each.effective_bytes_per_s(source, 2) for each in measured}
            (codec,) = [name for start, stop, name in ranges if start <= source < stop]
            assert rates[codec] == max(rates.values())


def test_a_codec_that_is_not_exact_is_an_error(monkeypatch, market, document):
    """Measuring also proves that every page comes back as it was."""

    def forgetful(*args, page_bytes):
        args[-1][0].fill(0)

    monkeypatch.setattr("vllm_kvmarket.store.codec.decode_into", forgetful)
    with pytest.raises(StoreError, match="is not exact here"):
        report_on(market, document, 1, SAMPLE_BYTES)
