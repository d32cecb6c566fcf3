"""Pages of made-up models in every packing, written element by element as the kernels do."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from vllm_kvmarket.core.model_identity import ROOT, chunk_key, pack_tokens
from vllm_kvmarket.store import ChunkLayout, LayerLayout, Tiers
from vllm_kvmarket.store.conversion import copy_converted

NAMESPACE = bytes(range(32))
CHUNK_TOKENS = 256
DTYPES = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32, "uint8": np.uint8}
VEC, AMX = "012/cpu-vec", "012/cpu-amx"
HND, NHD = "012/cuda-tokens", "102/cuda-tokens"


@dataclasses.dataclass(frozen=True)
class Model:
    """The facts that all layouts of one model share."""

    heads: int = 4
    dim: int = 32
    layers: int = 2
    dtype: str = "bfloat16"

    def layout(
        self,
        block_tokens: int,
        tag: str = VEC,
        rank: int = 0,
        world_size: int = 1,
        replicas: int = 1,
    ) -> ChunkLayout:
        """One rank's layout."""
        here = max(1, self.heads * replicas // world_size)
        item = DTYPES[self.dtype]().itemsize
        shape = (here, block_tokens, 2 * self.dim)
        return ChunkLayout(
            tag=tag if replicas == 1 else f"{tag}/x{replicas}",
            dtype=self.dtype,
            block_tokens=block_tokens,
            layers=tuple(
                LayerLayout(f"layer.{index}", shape, int(np.prod(shape)) * item)
                for index in range(self.layers)
            ),
            rank=rank,
            world_size=world_size,
        )


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk's true content: values[layer][token, head, K or V element], on every head."""

    model: Model
    tokens: bytes
    values: tuple[np.ndarray, ...]

    @property
    def key(self) -> bytes:
        """The chunk's key."""
        return chunk_key(NAMESPACE, ROOT, self.tokens)

    @property
    def token_count(self) -> int:
        """How many tokens it has."""
        return len(self.values[0])


def chunk_of(model: Model, tokens: int = CHUNK_TOKENS, seed: int = 0) -> Chunk:
    """Random bits, NaNs included."""
    rng = np.random.default_rng(seed)
    size = (tokens, model.heads, 2 * model.dim)
    kind = DTYPES[model.dtype]
    return Chunk(
        model,
        pack_tokens(random.Random(seed).choices(range(50_000), k=tokens)),
        tuple(
            rng.integers(0, np.iinfo(kind).max, size, dtype=kind, endpoint=True)
            for _ in range(model.layers)
        ),
    )


def heads_of(layout: ChunkLayout) -> slice:
    """A rank's heads, computed from its number in another way than the code does."""
    replicas = int(layout.tag.partition("/x")[2] or 1)
    here = layout.layers[0].page_shape[0]
    group = layout.rank // replicas
    return slice(group * here, (group + 1) * here)


def place(tag: str, dim: int, tokens: int, token: int, element: int) -> int:
    """Where in a head's part of a CPU page an element lies: the kernels' index arithmetic."""
    is_value, i = divmod(element, dim)
    plane = is_value * dim * tokens
    if tag.startswith(VEC):
        return plane + (token * dim + i if is_value else i * tokens + token)
    assert tag.startswith(AMX)
    if is_value:
        group, j = divmod(i, 16)
        return plane + group * tokens * 16 + (token // 2) * 32 + j * 2 + token % 2
    group, t = divmod(token, 16)
    return plane + group * 16 * dim + (i // 2) * 32 + t * 2 + i % 2


def pages_of(chunk: Chunk, layout: ChunkLayout, filler: int = 0x5A) -> list[np.ndarray]:
    """Write pages as an engine does, element by element; unused slots hold `filler`."""
    heads = heads_of(layout)
    block, dim = layout.block_tokens, chunk.model.dim
    count = layout.page_count(chunk.token_count)
    kind = DTYPES[layout.dtype]
    result = []
    for values in chunk.values:
        mine = values[:, heads]
        slots = np.frombuffer(bytes([filler]) * kind().itemsize, kind)[0]
        padded = np.full((count * block, *mine.shape[1:]), slots, kind)
        padded[: len(mine)] = mine
        blocks = padded.reshape(count, block, mine.shape[1], 2 * dim)
        if "tokens" in layout.tag:
            order = (0, 1, 2, 3) if layout.tag.startswith("102") else (0, 2, 1, 3)
            pages = blocks.transpose(order)
        else:
            index = np.array(
                [
                    [place(layout.tag, dim, block, token, element) for element in range(2 * dim)]
                    for token in range(block)
                ]
            )
            pages = np.empty((count, mine.shape[1], block * 2 * dim), kind)
            pages[:, :, index.reshape(-1)] = blocks.transpose(0, 2, 1, 3).reshape(
                count, mine.shape[1], -1
            )
        result.append(np.ascontiguousarray(pages).view(np.uint8).reshape(count, -1))
    return result


def put(store: Tiers, chunk: Chunk, layout: ChunkLayout) -> None:
    """Store one rank's share."""
    store.put(
        key=chunk.key,
        parent=ROOT,
        namespace=NAMESPACE,
        tokens=chunk.tokens,
        layout=layout,
        layers=[list(pages) for pages in pages_of(chunk, layout)],
    )


def load(
    store: Tiers, chunk: Chunk, layout: ChunkLayout, first: int = 0, last: int | None = None
) -> list[np.ndarray]:
    """Load pages into runs that lie apart; afterwards one array (pages, page_bytes) a layer."""
    last = layout.page_count(chunk.token_count) if last is None else last
    room = [np.full((last - first, layer.page_bytes), 0xAA, np.uint8) for layer in layout.layers]
    cut = (last - first) // 3
    runs = [[run.reshape(-1) for run in (pages[:cut], pages[cut:]) if len(run)] for pages in room]
    copy_converted(store, chunk.key, layout, NAMESPACE, first, last, runs)
    return room


def assert_loads(store: Tiers, chunk: Chunk, layout: ChunkLayout) -> None:
    """All of it, and parts, are what this engine would have written, with zeros in unused slots."""
    expected = pages_of(chunk, layout, filler=0)
    count = layout.page_count(chunk.token_count)
    for first, last in {(0, count), (0, 1), (count - 1, count), (count // 2, count)}:
        for got, want in zip(load(store, chunk, layout, first, last), expected, strict=True):
            np.testing.assert_array_equal(got, want[first:last])
