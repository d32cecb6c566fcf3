"""Namespaces, chunk keys and document ids are the same everywhere, and never the same by chance."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvmarket.core import model_identity
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.model_identity import (
    ROOT,
    NamespaceFacts,
    adapter_digest,
    canonical_model_config,
    chunk_key,
    chunks_between_states,
    document_id,
    has_state,
    is_key_of,
    keeps_states,
    marked,
    namespace_digest,
    pack_tokens,
    unpack_tokens,
    weights_digest,
)

NAMESPACE = bytes(range(32))
FACTS = NamespaceFacts(weights=("blake3:" + "0" * 64,), settings="1" * 64)
TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=40)

# Whoever published under these keys must find their chunks for ever: never change them.
GOLDEN = {
    "keys": [
        "396af90d144de101ad95068f40d7722cb628f3599154c42ce80c398c2a2e2db0",
        "7976730089de8e4bc37af4612f0cd5c2874c368f0a87631b1f449ae1154451a6",
    ],
    "document": "kvd_7976730089de8e4bc37af4612f0cd5c2",
    "namespace": "25192fc913b5ce75f12467252c44b045ff8ced2968d556a65224e965f00fbad2",
}
GOLDEN_SCRIPT = """
import json
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.model_identity import *
facts = NamespaceFacts(weights=("blake3:" + "0" * 64,), settings="1" * 64)
keys = DocumentChunks.of(bytes(range(32)), range(300)).keys
print(json.dumps({
    "keys": [key.hex() for key in keys],
    "document": document_id(keys[-1]),
    "namespace": namespace_digest(facts).hex(),
    "config": canonical_model_config({"b": {"y", "x", "w"}, "a": {10: 1, 2: 1}}),
}))
"""


def golden_values_with(**environment: str) -> dict[str, object]:
    answer = subprocess.run(
        [sys.executable, "-c", GOLDEN_SCRIPT],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(answer.stdout))


# Tokens


@given(TOKEN_IDS)
def test_packed_tokens_are_little_endian_uint32_and_come_back(token_ids):
    """Packing is what struct calls <I, one after another, and loses nothing."""
    packed = pack_tokens(token_ids)
    assert packed == struct.pack(f"<{len(token_ids)}I", *token_ids)
    assert unpack_tokens(packed) == token_ids


@pytest.mark.parametrize(
    "bad", [[-1], [1, 2**32], [1.5], ["1"], [None], "12", b"\0\0\0\0", bytearray(4)]
)
def test_what_are_no_token_ids_is_refused(bad):
    """Negative, too large or no integers: a ValueError, never another document's key."""
    with pytest.raises(ValueError, match="token ids must be integers"):
        pack_tokens(bad)


def test_token_ids_may_come_as_any_sequence_of_integers():
    """Lists, tuples, ranges and numpy arrays pack to the same bytes."""
    packed = pack_tokens([0, 1, 2])
    assert pack_tokens((0, 1, 2)) == pack_tokens(range(3)) == packed
    assert pack_tokens(np.arange(3)) == packed


# Chunk keys


def test_keys_and_ids_are_the_golden_ones():
    """The digests of a known document and known facts never change."""
    keys = DocumentChunks.of(NAMESPACE, range(300)).keys
    assert [key.hex() for key in keys] == GOLDEN["keys"]
    assert document_id(keys[-1]) == GOLDEN["document"]
    assert namespace_digest(FACTS).hex() == GOLDEN["namespace"]


def test_where_a_model_keeps_a_state_a_documents_last_chunk_is_another_one():
    """Namespace and key show it, and each key belongs to one kind of chunk only."""
    stateful = namespace_digest(msgspec.structs.replace(FACTS, chunks_between_states=0))
    assert stateful.hex() == GOLDEN["namespace"][:48] + b"\0state\0\0".hex()
    assert (keeps_states(stateful), keeps_states(NAMESPACE)) == (True, False)
    short, long = (DocumentChunks.of(stateful, range(count), 256) for count in (512, 513))
    marks = [[has_state(key) for key in document.keys] for document in (short, long)]
    assert marks == [[False, True], [False, False, True]]
    assert short.keys[0] == long.keys[0]
    assert short.keys[1][:24] == long.keys[1][:24]
    for document in (short, long):
        for key, parent, tokens in zip(
            document.keys, document.parents, document.tokens, strict=True
        ):
            assert is_key_of(key, stateful, parent, tokens)
            assert not is_key_of(key, NAMESPACE, parent, tokens)
    plain = chunk_key(NAMESPACE, ROOT, short.tokens[0])
    assert is_key_of(plain, NAMESPACE, ROOT, short.tokens[0])
    assert not is_key_of(marked(plain), NAMESPACE, ROOT, short.tokens[0])


def test_states_inside_a_document_are_behind_chunks_that_its_namespace_tells():
    """So documents that begin alike share these chunks too, whichever of them ends there."""
    facts = msgspec.structs.replace(FACTS, chunks_between_states=2)
    stateful = namespace_digest(facts)
    assert (keeps_states(stateful), chunks_between_states(stateful)) == (True, 2)
    assert chunks_between_states(NAMESPACE) == 0
    short, long = (DocumentChunks.of(stateful, range(count), 16) for count in (64, 83))
    marks = [[has_state(key) for key in document.keys] for document in (short, long)]
    assert marks == [[False, True, False, True], [False, True, False, True, False, True]]
    assert short.keys == long.keys[:4]
    for key, parent, tokens in zip(long.keys, long.parents, long.tokens, strict=True):
        assert is_key_of(key, stateful, parent, tokens)


def test_a_key_is_blake3_over_length_and_content_of_each_part():
    """The encoding, written down a second time."""
    tokens = pack_tokens([1, 2, 3])
    encoded = b"".join(struct.pack("<Q", len(part)) + part for part in (NAMESPACE, ROOT, tokens))
    expected = blake3(encoded, derive_key_context="kvmarket 2026-11 chunk key").digest()
    assert chunk_key(NAMESPACE, ROOT, tokens) == expected


@pytest.mark.parametrize("seed", ["0", "1", "4711"])
def test_other_processes_compute_the_same_whatever_their_hash_seed(seed):
    """Processes under other PYTHONHASHSEEDs agree on keys, ids, namespaces and configs."""
    values = golden_values_with(PYTHONHASHSEED=seed)
    assert values.pop("config") == '{"a":{"10":1,"2":1},"b":["w","x","y"]}'
    assert values == GOLDEN


@given(TOKEN_IDS, TOKEN_IDS, st.integers(1, 8))
def test_documents_share_keys_exactly_as_far_as_they_share_whole_chunks(a, b, chunk_tokens):
    """Equal leading chunks have equal keys; from the first difference on, none is equal."""
    keys_a, keys_b = (DocumentChunks.of(NAMESPACE, each, chunk_tokens).keys for each in (a, b))
    assert len(keys_a) == -(-len(a) // chunk_tokens)
    same = True
    for index, (key_a, key_b) in enumerate(zip(keys_a, keys_b, strict=False)):
        part = slice(index * chunk_tokens, (index + 1) * chunk_tokens)
        same = same and a[part] == b[part]
        assert (key_a == key_b) == same


@given(st.lists(st.binary(max_size=12), min_size=3, max_size=3), st.data())
def test_moving_a_byte_from_one_part_to_the_next_changes_the_key(parts, data):
    """No two ways to cut the same bytes into namespace, parent and tokens share a key."""
    joined = b"".join(parts)
    first = data.draw(st.integers(0, len(joined)))
    second = data.draw(st.integers(first, len(joined)))
    other = [joined[:first], joined[first:second], joined[second:]]
    assert (chunk_key(*parts) == chunk_key(*other)) == (parts == other)


def test_every_part_of_a_chunk_decides_its_key():
    """Namespace, parent and tokens each change the key; an empty document has none."""
    tokens = pack_tokens([1, 2])
    key = chunk_key(NAMESPACE, ROOT, tokens)
    assert len(key) == 32
    assert (
        len({key, chunk_key(ROOT, ROOT, tokens), chunk_key(NAMESPACE, key, tokens), b""})
        == len({key, chunk_key(NAMESPACE, ROOT, tokens + tokens), chunk_key(key, key, b""), b""})
        == 4
    )
    assert DocumentChunks.of(NAMESPACE, []).keys == ()


# Namespaces


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": ("blake3:" + "1" * 64,)},
        {"weights": ("blake3:" + "0" * 64, "blake3:" + "0" * 64)},
        {"settings": "2" * 64},
        {"adapter": "00"},
    ],
)
def test_every_fact_decides_the_namespace(changed):
    """Change any one of the facts and nothing is shared any more."""
    assert len(namespace_digest(FACTS)) == 32
    assert namespace_digest(msgspec.structs.replace(FACTS, **changed)) != namespace_digest(FACTS)


def test_a_config_is_canonical_but_for_what_cannot_change_kv():
    """Key order and a model's origin do not matter; its architecture and numbers do."""
    config = {"architectures": ["A"], "hidden_size": 8, "rope_scaling": {"b": 1, "a": 2}}
    origin = {"_name_or_path": "x", "transformers_version": "5", "torch_dtype": "float16"}
    same = {"rope_scaling": {"a": 2, "b": 1}, **origin, "hidden_size": 8, "architectures": ["A"]}
    assert canonical_model_config(config) == canonical_model_config(same)
    assert canonical_model_config(config) != canonical_model_config(config | {"hidden_size": 9})
    assert "architectures" in canonical_model_config(config)


def test_a_config_in_memory_is_spelled_as_its_file_is():
    """Integer keys sort as the strings that JSON makes of them."""
    config = {"id2label": {10: "a", 2: "b"}}
    assert canonical_model_config(config) == canonical_model_config(json.loads(json.dumps(config)))


def test_a_config_value_without_a_fixed_spelling_is_refused():
    """An object that prints its address would give another namespace in every process."""
    with pytest.raises(ConfigError, match="no fixed spelling"):
        canonical_model_config({"hook": object()})


# Weights


def model(folder: Path, seed: int, name: str = "model.safetensors") -> Path:
    """Make a small model folder whose weights come from a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(seed).standard_normal(1000).astype(np.float32)
    (folder / name).write_bytes(weights.tobytes())
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "market" / "digests.json"


def test_models_of_one_name_with_other_weights_never_share(tmp_path, cache):
    """Two seeds give two digests; a copy elsewhere gives the same one."""
    first = weights_digest(model(tmp_path / "a" / "tiny", seed=1), cache)
    second = weights_digest(model(tmp_path / "b" / "tiny", seed=2), cache)
    copy = weights_digest(model(tmp_path / "c" / "tiny", seed=1), cache)
    assert first.startswith("blake3:")
    assert first == copy != second


def test_retrained_weights_in_the_same_folder_are_noticed(tmp_path, cache):
    """New content under an old name means a new digest."""
    folder = model(tmp_path / "tiny", seed=1)
    before = weights_digest(folder, cache)
    model(folder, seed=2)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert weights_digest(folder, cache) != before


def settle() -> None:
    """Wait until the file system's clock has moved on."""
    time.sleep(2 * model_identity._CTIME_TICK_S)


def test_unchanged_weights_are_not_read_again(tmp_path, cache, monkeypatch):
    """A file that is known and was not touched is taken at its word."""
    folder = model(tmp_path / "tiny", seed=1)
    settle()
    before = weights_digest(folder, cache)
    monkeypatch.setattr(model_identity, "_digest_file", None)
    assert weights_digest(folder, cache) == before


@pytest.mark.parametrize("way", ["written", "put in its place", "linked"])
def test_other_weights_of_equal_size_and_time_are_noticed(tmp_path, cache, way):
    """Nobody can set the time of a file's last change of any kind."""
    folder = model(tmp_path / "tiny", seed=1)
    file = folder / "model.safetensors"
    os.utime(file, ns=(5, 5))
    settle()
    before = weights_digest(folder, cache)
    other = model(tmp_path / "other", seed=2) / "model.safetensors"
    os.utime(other, ns=(5, 5))
    if way == "written":
        file.write_bytes(other.read_bytes())
        os.utime(file, ns=(5, 5))
    elif way == "linked":
        file.unlink()
        file.symlink_to(other)
    else:
        other.replace(file)
    assert file.stat().st_mtime_ns == 5
    assert weights_digest(folder, cache) != before


def test_a_digest_is_not_kept_while_the_clock_of_files_stands(tmp_path, cache):
    """A change in the same tick would leave the file's times as they are."""
    folder = model(tmp_path / "tiny", seed=1)
    os.utime(folder / "model.safetensors")
    weights_digest(folder, cache)
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "null"])
def test_a_broken_digest_cache_only_costs_reading(tmp_path, cache, content):
    """With any content of the cache file, the digest is that of the weights."""
    folder = model(tmp_path / "tiny", seed=1)
    settle()
    good = weights_digest(folder, cache)
    cache.write_text(content)
    assert weights_digest(folder, cache) == good
    wrong = dict.fromkeys(json.loads(cache.read_text()), "zz")
    cache.write_text(json.dumps(wrong))
    assert weights_digest(folder, cache) == good


def test_the_digest_cache_keeps_other_models_and_leaves_nothing_behind(tmp_path, cache):
    """Writing a model's digest keeps those of others, and no draft stays."""
    models = [model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    settle()
    for each in models:
        weights_digest(each, cache)
    assert len(json.loads(cache.read_text())) == 2
    assert {file.name for file in cache.parent.iterdir()} == {cache.name, ".lock"}


def test_every_shard_and_its_name_count(tmp_path, cache):
    """One shard more, less or under another name is another model."""
    folder = model(tmp_path / "tiny", 1, "model-1.safetensors")
    one = weights_digest(folder, cache)
    model(folder, 2, "model-2.safetensors")
    two = weights_digest(folder, cache)
    (folder / "model-2.safetensors").rename(folder / "model-3.safetensors")
    assert len({one, two, weights_digest(folder, cache)}) == 3


def test_safetensors_are_the_weights_where_there_are_any(tmp_path, cache):
    """Other formats count only where there are no safetensors, and then all of them."""
    folder = model(tmp_path / "tiny", 1, "model.bin")
    without = weights_digest(folder, cache)
    model(folder, 2, "model.gguf")
    both = weights_digest(folder, cache)
    model(folder, 3)
    safe = weights_digest(folder, cache)
    (folder / "model.bin").unlink()
    assert len({without, both, safe}) == 3
    assert weights_digest(folder, cache) == safe


def test_one_of_several_weight_files_may_be_the_model(tmp_path, cache):
    """Two quantizations in one folder are two models when they are named by file."""
    folder = model(tmp_path / "tiny", 1, "q4.gguf")
    model(folder, 2, "q8.gguf")
    q4, q8 = (weights_digest(folder / name, cache) for name in ("q4.gguf", "q8.gguf"))
    assert len({q4, q8, weights_digest(folder, cache)}) == 3


def test_a_snapshot_of_the_hub_is_the_model_that_it_holds(tmp_path, cache):
    """Its files are links, and may have been changed: they are read as any other's."""
    blob = model(tmp_path / "blobs", seed=1) / "model.safetensors"
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    assert weights_digest(snapshot, cache) == weights_digest(tmp_path / "blobs", cache)


def test_all_formats_count_where_another_than_safetensors_is_loaded(tmp_path, cache):
    """vLLM was told to load these."""
    folder = model(model(tmp_path / "tiny", 1), 2, "model.bin")
    before = weights_digest(folder, cache, all_formats=True)
    model(folder, 3, "model.bin")
    assert weights_digest(folder, cache, all_formats=True) != before


def test_a_folder_without_weights_is_an_error_that_says_so(tmp_path, cache):
    """Without weights there is no telling whose KV it is."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no weights"):
        weights_digest(tmp_path, cache)
    with pytest.raises(ConfigError, match="holds no weights"):
        weights_digest(tmp_path / "nowhere", cache)


def test_weights_that_change_while_they_are_read_are_an_error(tmp_path, cache, monkeypatch):
    """A digest of half a file must not be kept."""
    times = iter(["before", "after"])
    monkeypatch.setattr(model_identity, "file_identity", lambda _file: next(times))
    with pytest.raises(ConfigError, match="changed while it was read"):
        weights_digest(model(tmp_path / "tiny", seed=1), cache)
    assert not cache.exists()


def test_an_adapter_is_its_weights_and_its_config(tmp_path, cache):
    """Another rank, other weights or settings make another adapter, another place does not."""
    digests = set()
    for name, seed, rank in (("a", 1, 8), ("copy", 1, 8), ("b", 2, 8), ("c", 1, 16)):
        folder = model(tmp_path / name, seed, "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
        digests.add(adapter_digest(folder, cache, {"dtype": "float32"}))
    assert len(digests) == 3
    assert adapter_digest(tmp_path / "a", cache, {"dtype": "bfloat16"}) not in digests
    # vLLM loads the .bin file if the other one has not just the name that it looks for.
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"1")
    assert adapter_digest(tmp_path / "a", cache, {"dtype": "float32"}) not in digests
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        adapter_digest(tmp_path / "a", cache, {})
    with pytest.raises(ConfigError, match="holds no weights"):
        adapter_digest(tmp_path / "none", cache, {})
