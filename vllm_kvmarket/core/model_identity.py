"""Who is who: namespaces, chunk keys, document ids.

All of them are BLAKE3 digests over an unambiguous encoding, the same on every machine, in every
process, under every PYTHONHASHSEED and block size. Stored chunks are named by them: changing an
encoding means new contexts below, and makes everything that was published unreachable.
"""

from __future__ import annotations

import functools
import json
import os
import re
import struct
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from vllm_kvmarket.core.durable_files import locked, write_durably
from vllm_kvmarket.core.errors import ConfigError

CHUNK_TOKENS = 256
KEY_BYTES = 32
TOKEN_BYTES = 4
ROOT = bytes(KEY_BYTES)
# Behind it, the end of the namespace of a model with recurrent state says after how many chunks
# there is one, 0 for documents' ends alone. The key of a chunk with a state ends with it and 0.
_STATE_MARK = b"\0state"
_MARK_BYTES = len(_STATE_MARK) + 2

# BLAKE3's derive-key contexts: a digest of one kind can never pass for one of another.
_CHUNK_CONTEXT = "kvmarket 2026-11 chunk key"
_NAMESPACE_CONTEXT = "kvmarket 2026-11-30 namespace"
_SETTINGS_CONTEXT = "kvmarket 2026-11-30 model settings"
_WEIGHTS_CONTEXT = "kvmarket 2026-11 weights"
_ADAPTER_CONTEXT = "kvmarket 2026-11 adapter"
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
# vLLM loads safetensors where there are any, and only then looks for the others.
_WEIGHT_PATTERNS = (("*.safetensors",), ("*.bin", "*.pt", "*.gguf"))
# The kernel's clock of files may stand still for this long.
_CTIME_TICK_S = 0.05
# Keys of a model's config that say where it came from or how it is run, not what it computes.
_VOLATILE = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"),
        *("auto_map", "id2label", "label2id", "problem_type", "return_dict"),
        *("output_attentions", "output_hidden_states", "initializer_range"),
    }
)


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Encode token ids as little-endian uint32.

    Raises ValueError for anything that is not an integer from 0 to 2**32 - 1.
    """
    if isinstance(token_ids, (bytes, bytearray, memoryview)):
        raise ValueError("token ids must be integers, not bytes that are packed already")
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers from 0 to 2**32 - 1: {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """Decode what `pack_tokens` encoded."""
    tokens = array("I")
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()


def chunk_key(namespace: bytes, parent: bytes, tokens: bytes) -> bytes:
    """Digest a chunk into its 32-byte key.

    `parent` is the key of the chunk before it (ROOT for none), `tokens` are packed. Each part is
    preceded by its length, so that no two different chunks encode to the same bytes.
    """
    encoded = b"".join(
        piece for part in (namespace, parent, tokens) for piece in (_length(part), part)
    )
    return blake3(encoded, derive_key_context=_CHUNK_CONTEXT).digest()


def keeps_states(namespace: bytes) -> bool:
    """Whether a namespace's model has recurrent layers, so that a reuse ends where a state is."""
    return namespace[-_MARK_BYTES:-2] == _STATE_MARK


def chunks_between_states(namespace: bytes) -> int:
    """After how many chunks inside a document there is a state; 0 for none inside it."""
    return int.from_bytes(namespace[-2:], "big") if keeps_states(namespace) else 0


def has_state(key: bytes) -> bool:
    """Whether a chunk of such a namespace has the recurrent state after its last token."""
    return key.endswith(_STATE_MARK + b"\0\0")


def marked(digest: bytes, chunks_between: int = 0) -> bytes:
    """Mark a namespace, or a chunk's key, as one with recurrent state."""
    return digest[:-_MARK_BYTES] + _STATE_MARK + chunks_between.to_bytes(2, "big")


def is_key_of(key: bytes, namespace: bytes, parent: bytes, tokens: bytes) -> bool:
    """Whether this is a key of the chunk, with a state or without."""
    expected = chunk_key(namespace, parent, tokens)
    return key == (marked(expected) if keeps_states(namespace) and has_state(key) else expected)


def _length(part: bytes) -> bytes:
    return struct.pack("<Q", len(part))


def keys_of(namespace: bytes, chunks: Sequence[bytes]) -> list[bytes]:
    """Compute the keys of a document's chunks, in order, from their packed tokens.

    Where the model has recurrent layers, a document's last chunk has their state, and so has each
    chunk with which `chunks_between_states` end. Such a chunk is another one than the same tokens
    without a state.
    """
    keys: list[bytes] = []
    parent = ROOT
    between = chunks_between_states(namespace)
    last = len(chunks) if keeps_states(namespace) else 0
    for count, tokens in enumerate(chunks, 1):
        parent = chunk_key(namespace, parent, tokens)
        if count == last or (between and count % between == 0):
            parent = marked(parent)
        keys.append(parent)
    return keys


def document_id(leaf_key: bytes) -> str:
    """Name the document that ends with this chunk: the key chain covers all its tokens."""
    return f"kvd_{leaf_key.hex()[:32]}"


class NamespaceFacts(msgspec.Struct, frozen=True):
    """Everything that decides what KV bytes mean; equal facts, interchangeable KV.

    `weights` are what `weights_digest` returns, `settings` what `settings_digest`, `adapter` what
    `adapter_digest`. `chunks_between_states`: None where the model has no recurrent layers.
    """

    weights: tuple[str, ...]
    settings: str
    adapter: str | None = None
    chunks_between_states: int | None = None


@functools.lru_cache(256)
def namespace_digest(facts: NamespaceFacts) -> bytes:
    """Digest these facts into their 32-byte namespace, which shows whether there are states."""
    plain = msgspec.to_builtins(facts)
    between = plain.pop("chunks_between_states")
    encoded = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    digest = blake3(encoded.encode(), derive_key_context=_NAMESPACE_CONTEXT).digest()
    return digest if between is None else marked(digest, between)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest an engine's settings that decide KV. Raises ConfigError as `canonical_json` does."""
    encoded = canonical_json(settings).encode()
    return blake3(encoded, derive_key_context=_SETTINGS_CONTEXT).hexdigest()


def canonical_model_config(config: Mapping[str, Any]) -> str:
    """Spell a model's config in one canonical way, without what cannot change its KV.

    Raises ConfigError for a value whose spelling would differ from one process to the next.
    """
    return canonical_json(_without_volatile(config))


def _without_volatile(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what cannot change KV, here and in the configs of parts; null means not set."""
    return {
        key: _without_volatile(value)
        if isinstance(value, Mapping) and "model_type" in value
        else value
        for key, value in config.items()
        if key not in _VOLATILE and value is not None
    }


def canonical_json(values: Mapping[str, Any]) -> str:
    """Spell values in one way. Raises ConfigError for one without a fixed spelling."""
    # Keys become strings before they are sorted: {2: ..., 10: ...} must sort as a file's would.
    plain = json.loads(json.dumps(values, default=_spelled))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _spelled(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if type(value).__str__ is object.__str__ and type(value).__repr__ is object.__repr__:
        raise ConfigError(
            f"the model's config holds a {type(value).__name__}, which has no fixed spelling; "
            "kvmarket cannot tell this model's KV from another's"
        )
    return str(value)


def weights_digest(model_dir: Path, cache_file: Path, *, all_formats: bool = False) -> str:
    """Say what the weights in a folder, or in one weight file, are: "blake3:<digest>".

    Reading gigabytes takes seconds, so each file's digest is kept in `cache_file`, for as long as
    the file is the same; mutates that file. `all_formats`: also files beside safetensors. Raises
    ConfigError when there are no weights, or when they change while they are read.
    """
    files = weight_files(model_dir, all_formats=all_formats)
    if not files:
        raise ConfigError(
            f"{model_dir} holds no weights "
            f"({', '.join(pattern for group in _WEIGHT_PATTERNS for pattern in group)}); "
            "kvmarket needs them to tell one model's KV from another's"
        )
    return f"blake3:{_digest_files(files, cache_file)}"


def adapter_digest(adapter_dir: Path, cache_file: Path, settings: Mapping[str, Any]) -> str:
    """Say what a LoRA adapter is: its weights, its adapter_config.json, and what of the engine's
    settings decides how it is used.

    Raises ConfigError as `weights_digest` does, and for a config that is not JSON.
    """
    weights = weights_digest(adapter_dir, cache_file, all_formats=True)
    described = ""
    config_file = adapter_dir / "adapter_config.json"
    if config_file.exists():
        try:
            described = canonical_model_config(json.loads(config_file.read_text()))
        except ValueError as error:
            raise ConfigError(f"{config_file} is not JSON ({error}); restore it") from None
    encoded = json.dumps([weights, described, canonical_json(settings)])
    return blake3(encoded.encode(), derive_key_context=_ADAPTER_CONTEXT).hexdigest()


def weight_files(path: Path, *, all_formats: bool = False) -> list[Path]:
    """The files that hold the weights of a model or an adapter, sorted."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    for group in _WEIGHT_PATTERNS:
        found += sorted(file for pattern in group for file in path.glob(pattern) if file.is_file())
        if found and not all_formats:
            return found
    return found


def _digest_files(files: Sequence[Path], cache_file: Path) -> str:
    """Digest files, which several processes of a starting server want at the same time."""
    with locked(cache_file.parent):
        known = _read_cache(cache_file)
        read: dict[str, str] = {}
        whole = blake3(derive_key_context=_WEIGHTS_CONTEXT)
        for file in files:
            identity = file_identity(file)
            digest = known.get(identity)
            if digest is None:
                digest = _digest_file(file, identity)
                if _is_settled(file):
                    read[identity] = digest
            name = os.fsencode(file.name)
            whole.update(_length(name) + name + bytes.fromhex(digest))
        if read:
            _write_cache(cache_file, known | read)
    return whole.hexdigest()


def file_identity(file: Path) -> str:
    """A text that changes whenever the file's content does: no user can set a file's ctime."""
    status = file.stat()
    times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
    return f"{os.path.abspath(file)}|{status.st_size}|{times}|{status.st_ino}"  # noqa: PTH100  # links are not followed


def _is_settled(file: Path) -> bool:
    """Whether a change from now on would change the ctime, which moves in ticks."""
    return time.time() - file.stat().st_ctime > _CTIME_TICK_S


def _digest_file(file: Path, identity: str) -> str:
    digest = blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
    if file_identity(file) != identity:
        raise ConfigError(f"{file} changed while it was read; start again once it is written")
    return digest


def _read_cache(cache_file: Path) -> dict[str, str]:
    """Read the digests that are known; what cannot be read or is no digest is read anew."""
    try:
        cache = json.loads(cache_file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(cache, dict):
        return {}
    return {
        identity: digest
        for identity, digest in cache.items()
        if isinstance(digest, str) and _HEX_DIGEST.fullmatch(digest)
    }


def _write_cache(cache_file: Path, cache: Mapping[str, str]) -> None:
    write_durably(cache_file, json.dumps(cache, indent=0).encode())
