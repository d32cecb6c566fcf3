"""Everything that can happen to a stored chunk, for real: the answer stays right, nobody pays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.support.asking import wait_until
from tests.support.engines import words
from vllm_kvmarket import Market
from vllm_kvmarket.core.model_identity import chunk_key
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache
from vllm_kvmarket.store import chunk_format, open_chunk

QUESTION = words(996, 10)
LENGTH = 700  # two whole chunks and a short one
BROKEN = 1  # which chunk of the three is damaged


def flip(offset: Callable[[Path], int]) -> Callable[[Path], None]:
    """Change one bit of a file, at a place that depends on it."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[offset(path)] ^= 0x10
        path.write_bytes(content)

    return damage


def in_header(path: Path) -> int:
    return chunk_format.PREFIX_BYTES + 40


def in_header_checksum(path: Path) -> int:
    return chunk_format.PREFIX_BYTES - 3


def in_layer(index: int) -> Callable[[Path], int]:
    """Somewhere in the payload of a layer."""

    def place(path: Path) -> int:
        with open_chunk(path, bytes.fromhex(path.name[:64])) as chunk:
            header = chunk.header
            payload = path.stat().st_size - header.layer_offsets[-1] - header.layer_bytes[-1]
            return payload + header.layer_offsets[index] + header.layer_bytes[index] // 3

    return place


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def remove(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("in the way")


def unreadable(path: Path) -> None:
    """No permissions; for root, who may read everything, a link that leads nowhere."""
    if os.geteuid() == 0:
        path.unlink()
        path.symlink_to(path.name)
    else:
        path.chmod(0)


def another_key(path: Path) -> None:
    """The file of another chunk of the same store, whole, under this one's name."""
    other = next(file for file in sorted(path.parents[1].glob("??/*.kv")) if file != path)
    shutil.copyfile(other, path)


def another_namespace(path: Path) -> None:
    """The same tokens and pages, wholly consistent, computed by another model's weights."""
    with open_chunk(path, bytes.fromhex(path.name[:64])) as chunk:
        header = chunk.header
        layers = [[chunk.layer(index)] for index in range(len(header.layout.layers))]
    namespace = bytes(32)
    prepared = chunk_format.prepare(
        key=chunk_key(namespace, header.parent, header.tokens),
        parent=header.parent,
        namespace=namespace,
        tokens=header.tokens,
        layout=header.layout,
        layers=layers,
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    prepared.write(descriptor)
    os.close(descriptor)


DAMAGE = {
    "a byte of the header": flip(in_header),
    "a byte of the header's checksum": flip(in_header_checksum),
    "a byte of the first layer": flip(in_layer(0)),
    "a byte of the second layer": flip(in_layer(1)),
    "a byte of the last layer": flip(in_layer(2)),
    "the last byte": flip(lambda path: path.stat().st_size - 1),
    "truncated": truncate,
    "empty": empty,
    "garbage": garbage,
    "missing": remove,
    "a directory": directory,
    "unreadable": unreadable,
    "another chunk's file": another_key,
    "another namespace's file": another_namespace,
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_fault_is_found_computed_instead_not_charged_and_repaired(llm, market: Market, fault):
    """The 24 tokens of full prefill; what lies before it is sold; publishing again repairs it."""
    document = words(5000 + list(DAMAGE).index(fault), LENGTH)
    listing = market.publish(llm, token_ids=document, title=fault)
    prompt = document + QUESTION
    empty_prefix_cache(llm)
    full = ask(llm, prompt, market.params("dave"), rest_s=0)
    empty_prefix_cache(llm)

    key = listing.chunk_keys[BROKEN]
    quarantined = len(market.store.disk.quarantined())
    DAMAGE[fault](market.store.disk.path(key))
    answer = ask(llm, prompt, market.params("alice"), rest_s=0)

    assert answer.token_ids == full.token_ids
    assert answer.market["reused_tokens"] == 256 * BROKEN
    receipt = market.receipt(answer.market["receipt_id"])
    assert receipt.charge_nano == 256 * BROKEN * 500
    assert receipt.tokens_failed == LENGTH - 256 * BROKEN
    wait_until(lambda: market.catalogue.get(listing.document_id).state == "damaged")
    assert not market.store.has(key)
    assert len(market.store.disk.quarantined()) - quarantined == (0 if fault == "missing" else 1)

    assert market.republish(llm, listing.document_id).state == "live"
    market.store.verify(key)
    empty_prefix_cache(llm)
    again = ask(llm, prompt, market.params("alice"), rest_s=0.3)
    assert again.token_ids == full.token_ids
    assert again.market["reused_tokens"] == LENGTH


def test_a_file_in_a_layout_that_nobody_knows_is_a_miss_and_no_damage(llm, market: Market):
    """Computed, not charged, neither quarantined nor taken off the market."""
    document = words(5100, LENGTH)
    listing = market.publish(llm, token_ids=document, title="strange layout")
    empty_prefix_cache(llm)
    full = ask(llm, document + QUESTION, market.params("dave"), rest_s=0)
    path = market.store.disk.path(listing.chunk_keys[0])
    with open_chunk(path, listing.chunk_keys[0]) as chunk:
        header = chunk.header
        layers = [[chunk.layer(index)] for index in range(len(header.layout.layers))]
    prepared = chunk_format.prepare(
        key=header.key,
        parent=header.parent,
        namespace=header.namespace,
        tokens=header.tokens,
        layout=msgspec.structs.replace(header.layout, tag="9/strange"),
        layers=layers,
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    prepared.write(descriptor)
    os.close(descriptor)
    empty_prefix_cache(llm)
    answer = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
    assert answer.token_ids == full.token_ids
    assert (answer.market["reused_tokens"], answer.market["charge_nano"]) == (0, 0)
    assert market.catalogue.get(listing.document_id).state == "live"
    assert market.store.has(listing.chunk_keys[0])
