"""Headers that lie: files whose front is wrong, whatever their checksums say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.support.kv_pages import kv_sample
from tests.support.store_chunks import NAMESPACE, OTHER_NAMESPACE, Sample, assert_damaged, stored
from vllm_kvmarket.core.errors import ChunkDamagedError, LayoutMismatchError
from vllm_kvmarket.core.model_identity import ROOT, chunk_key
from vllm_kvmarket.store import ChunkHeader, DiskStore, LayerLayout, chunk_format, open_chunk


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "chunks")


def forgeries(header: ChunkHeader) -> dict[str, dict[str, object]]:
    """Fields to replace, by what is wrong with them."""
    layout, replace = header.layout, msgspec.structs.replace
    nothing = {"layer_offsets": (), "layer_bytes": (), "checksums": ()}
    return {
        "key": {"key": b"k" * 32},
        "namespace": {"namespace": OTHER_NAMESPACE},
        "parent": {"parent": b"p" * 32},
        "tokens": {"tokens": bytes(28)},
        "half a token": {"tokens": header.tokens[:-1]},
        "no tokens": {"tokens": b""},
        "short key": {"key": header.key[:31]},
        "short namespace": {"namespace": b"n"},
        "offsets": {"layer_offsets": (0, 0, 0)},
        "negative offset": {"layer_offsets": (-4096, 0, 4096)},
        "offset in the middle": {"layer_offsets": (0, 1, 8192)},
        "size in the middle": {"layer_bytes": (200, 199, 200)},
        "sizes": {"layer_bytes": (200, 200, 199)},
        "missing checksum": {"checksums": header.checksums[:2]},
        "checksum too many": {"checksums": (*header.checksums, 1)},
        "no layers": {"layout": replace(layout, layers=()), **nothing},
        "no layers at an offset": {
            "layout": replace(layout, layers=()),
            **nothing,
            "layer_offsets": (0,),
        },
        "blocks of nothing": {"layout": replace(layout, block_tokens=0)},
        "pages of nothing": {"layout": replace(layout, layers=(LayerLayout("l", (0,), 0),) * 3)},
    }


def rewrite_header(store: DiskStore, chunk: Sample, **fields: object) -> None:
    """Give a stored chunk another header, checksum and all, in front of the same payload."""
    path = store.path(chunk.key)
    with store.open(chunk.key, chunk.layout, chunk.namespace) as opened:
        header = opened.header
    payload = path.read_bytes()[len(chunk_format.encode(header)) :]
    path.write_bytes(chunk_format.encode(msgspec.structs.replace(header, **fields)) + payload)


def test_forged_headers(store: DiskStore) -> None:
    """A header that contradicts itself, its payload or its key is damage, never a crash."""
    chunk, path = stored(store)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        wrong = forgeries(opened.header)
    for fields in wrong.values():
        rewrite_header(store, chunk, **fields)
        # For whatever layout the file claims, so that only its truth counts.
        with pytest.raises(ChunkDamagedError):
            open_chunk(path, chunk.key)
        assert_damaged(store, chunk)


def encoded_forgeries(header: ChunkHeader) -> dict[str, dict[str, object]]:
    """Fields to replace in the header of a chunk with two equal layers that are not raw."""
    first, second = header.layer_bytes
    pages = 2 * header.layout.layers[0].page_bytes
    large = LayerLayout("layer.0", (1 << 40,), 1 << 40)
    return {
        "raw": {"codec": "raw"},
        "offsets": {"layer_offsets": (0, first - 1)},
        "padding": {"layer_offsets": (0, 4096)},
        "a byte of the neighbour's": {
            "layer_bytes": (first + 1, second - 1),
            "layer_offsets": (0, first + 1),
        },
        "nothing": {"layer_bytes": (0, first + second), "layer_offsets": (0, 0)},
        "less than nothing": {"layer_bytes": (-1, first + second + 1), "layer_offsets": (0, -1)},
        "more than the pages": {
            "layer_bytes": (pages + 1, first + second - pages - 1),
            "layer_offsets": (0, pages + 1),
        },
        "one layer": {"layer_bytes": (first + second,), "layer_offsets": (0,)},
        "terabytes of pages": {
            "layout": msgspec.structs.replace(header.layout, layers=(large, large))
        },
        "another type": {"layout": msgspec.structs.replace(header.layout, dtype="float8")},
        "another page": {
            "layout": msgspec.structs.replace(
                header.layout, layers=(LayerLayout("layer.0", (64,), 64),) * 2
            )
        },
    }


def test_forged_headers_of_encoded_chunks(tmp_path: Path) -> None:
    """Sizes that no codec can have made, or that do not decode, are damage, and take no memory."""
    store = DiskStore(tmp_path / "chunks", codec="zstd-exponent")
    chunk = kv_sample(layers=2)
    chunk.put(store)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        wrong = encoded_forgeries(opened.header)
    for fields in wrong.values():
        rewrite_header(store, chunk, **fields)
        with pytest.raises(ChunkDamagedError):
            store.verify(chunk.key)
        assert chunk.put(store) > 0
        chunk.load(store)


@pytest.mark.parametrize("tokens", [b"", b"abc", b"abcde"])
def test_tokens_that_are_none(store: DiskStore, tokens: bytes) -> None:
    """A file under the very key of bytes that are no tokens is damage."""
    chunk, _ = stored(store)
    key = chunk_key(NAMESPACE, ROOT, tokens)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        header = msgspec.structs.replace(opened.header, key=key, tokens=tokens)
    store.path(key).parent.mkdir(exist_ok=True)
    for pages in (0, 1, 2):
        place = chunk_format.arrange(chunk.layout, pages)
        forged = msgspec.structs.replace(
            header, layer_bytes=place.sizes, layer_offsets=place.offsets
        )
        size = place.offsets[-1] + place.sizes[-1]
        store.path(key).write_bytes(chunk_format.encode(forged) + bytes(size))
        with pytest.raises(ChunkDamagedError):
            store.verify(key)


def test_a_header_that_claims_gigabytes(store: DiskStore) -> None:
    """A length that reaches beyond the file is refused before any memory is taken for it."""
    chunk, path = stored(store)
    content = bytearray(path.read_bytes())
    content[12:16] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(ChunkDamagedError, match="end inside the header"):
        chunk.load(store)


def test_refused_files_are_closed(store: DiskStore) -> None:
    """However often a damaged chunk is tried, no file stays open."""
    chunk, path = stored(store)
    before = len(list(Path("/proc/self/fd").iterdir()))
    path.write_bytes(b"damage" * 1000)
    for _ in range(20):
        with pytest.raises(ChunkDamagedError):
            chunk.load(store)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_unknown_codec_is_a_mismatch(store: DiskStore) -> None:
    """An intact chunk in a codec of a later kvmarket is no damage."""
    chunk, _ = stored(store)
    rewrite_header(store, chunk, codec="of-tomorrow")
    with pytest.raises(LayoutMismatchError, match="codec 'of-tomorrow'"):
        chunk.load(store)


def test_a_later_format_is_a_mismatch(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An intact chunk of a later format is no damage, though a flipped version byte is."""
    monkeypatch.setattr(chunk_format, "FORMAT_VERSION", 3)
    chunk, path = stored(store)
    monkeypatch.undo()
    with pytest.raises(LayoutMismatchError, match="format 3, this kvmarket reads 1 and 2"):
        chunk.load(store)
    content = bytearray(path.read_bytes())
    content[8] = 1
    path.write_bytes(content)
    with pytest.raises(ChunkDamagedError):
        chunk.load(store)


def test_a_plain_chunk_is_written_as_it_always_was(store: DiskStore) -> None:
    """In format 1, without the fields that came later: older kvmarkets read it."""
    _, path = stored(store)
    content = path.read_bytes()
    assert content[8] == 1
    assert b"state" not in content[:4096]


def test_a_version_that_contradicts_the_layers_is_damage(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain chunk is never read as one with states, nor the other way."""
    monkeypatch.setattr(chunk_format, "FORMAT_VERSION", 2)
    chunk, _ = stored(store)
    monkeypatch.undo()
    with pytest.raises(ChunkDamagedError, match="contradicts its header"):
        chunk.load(store)


def test_an_unknown_header_field_is_damage(store: DiskStore) -> None:
    """A field that this format does not have is not passed over."""
    chunk, path = stored(store)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        fields = msgspec.structs.asdict(opened.header)
    odd = msgspec.defstruct("Odd", [*fields, "surprise"])(**fields, surprise=1)
    payload = path.read_bytes()[4096:]
    path.write_bytes(chunk_format.encode(odd) + payload)
    with pytest.raises(ChunkDamagedError, match="surprise"):
        chunk.load(store)
