"""The paged cache as bytes: which layout it has, and how pages are read and written.

vLLM gives each layer a tensor of logical shape (blocks, ...) whose strides differ by backend. A
page
is one block of one layer, on every head. Whatever the order inside it, a page that is dense in
memory can be copied as it lies there; the order goes into the layout's tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import group_kernel_blocks

from vllm_kvmarket.connector.cache_groups import CacheGroup, GroupKind, is_plain, replicas
from vllm_kvmarket.core.errors import LayoutMismatchError
from vllm_kvmarket.store import ChunkLayout, LayerLayout
from vllm_kvmarket.store.packings import CPU_PACKINGS, TOKENS, canonical

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Bytes = npt.NDArray[np.uint8]
logger = init_logger("vllm.kvmarket.layouts")

# The CPU's backend for latent attention.
_LATENT_BACKEND = "AMX_MLA"
UNPROVEN_LATENT = "latent-unproven"
# How a kernel refuses that is not there, or takes other pages.
_KERNEL_ERRORS = (AttributeError, RuntimeError, NotImplementedError, TypeError)
# Backends that keep all of a token side by side. GPU backends take K and V apart by
# `kv_cache.split(head_size, dim=-1)`, in any order of heads and tokens.
_TOKEN_BACKENDS = {"FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "HPC_ATTN", "TRITON_ATTN"}
# Other KV dtypes have scales, or several groups of heads, in the same page.
_PLAIN_DTYPES = {"auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2"}


def byte_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One layer's cache as uint8 rows (blocks, page_bytes), sharing its memory.

    Raises LayoutMismatchError when a block's bytes are not dense.
    """
    page_elements = tensor[0].numel()
    span = 1 + sum(
        (size - 1) * stride
        for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )
    if span != page_elements:
        raise LayoutMismatchError(
            f"layer {name}: a block's bytes are spread over the cache "
            f"(shape {tuple(tensor.shape)}, strides {tensor.stride()}), "
            "which kvmarket cannot store; choose another attention backend"
        )
    item = tensor.element_size()
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    storage.set_(tensor.untyped_storage())
    return storage.as_strided(
        (tensor.shape[0], page_elements * item),
        (tensor.stride(0) * item, 1),
        tensor.storage_offset() * item,
    )


def page_order(tensor: torch.Tensor) -> str:
    """The dimensions inside a block from outermost to innermost in memory, for example `012`."""
    strides = tensor.stride()[1:]
    return "".join(str(i) for i in sorted(range(len(strides)), key=lambda i: -strides[i]))


def layout_tag(
    vllm_config: VllmConfig,
    kv_caches: dict[str, torch.Tensor],
    block_tokens: int,
    copies: int = 1,
) -> str:
    """All that decides the meaning of these layers' pages beside shape and dtype.

    `copies`: how many neighbouring ranks have the same pages, and share one file.

    Only a tag whose packing is known there can be converted; every other can still be copied into
    the same layout.
    """
    tensors = list(kv_caches.values())
    device = tensors[0].device.type
    if device == "cpu":
        packing = _cpu_packing(vllm_config, kv_caches, block_tokens)
    else:
        backends = _backends(vllm_config, kv_caches)
        plain = vllm_config.cache_config.cache_dtype in _PLAIN_DTYPES
        packing = TOKENS if plain and backends <= _TOKEN_BACKENDS else "+".join(sorted(backends))
    tag = f"{'+'.join(sorted({page_order(tensor) for tensor in tensors}))}/{device}-{packing}"
    parallel = vllm_config.parallel_config
    if parallel.world_size == copies:
        return tag
    if parallel.pipeline_parallel_size > 1:
        # A rank of as many has other layers elsewhere.
        return f"{tag}/stages-{parallel.pipeline_parallel_size}"
    total = vllm_config.model_config.get_total_num_kv_heads()
    ranks = parallel.tensor_parallel_size
    if any(tensor.shape[1] != max(1, total // ranks) for tensor in tensors):
        return f"{tag}/heads-vary"
    return tag if total >= ranks else f"{tag}/x{ranks // total}"


def _cpu_packing(
    vllm_config: VllmConfig, kv_caches: dict[str, torch.Tensor], block_tokens: int
) -> str:
    pages = {(tuple(tensor.shape[1:]), tensor.dtype) for tensor in kv_caches.values()}
    if _backends(vllm_config, kv_caches) == {_LATENT_BACKEND}:
        found = {latent_packing(shape, dtype) for shape, dtype in pages}
        return found.pop() if len(found) == 1 else UNPROVEN_LATENT
    # The kernels pack K per instruction set; vLLM has no public name for the choice.
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model = vllm_config.model_config
    isa = _get_attn_isa(
        model.dtype, block_tokens, model.get_head_size(), vllm_config.cache_config.cache_dtype
    )
    found = {proven_packing(isa, shape, dtype) for shape, dtype in pages}
    return found.pop() if len(found) == 1 else f"{isa}-unproven"


def _backends(vllm_config: VllmConfig, kv_caches: dict[str, torch.Tensor]) -> set[str]:
    """The names of the layers' attention backends."""
    layers = vllm_config.compilation_config.static_forward_context
    chosen = {getattr(layers.get(name), "attn_backend", None) for name in kv_caches}
    return {backend.get_name() if backend is not None else "unknown" for backend in chosen}


def proven_packing(isa: str, page_shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Find a CPU kernel's packing by letting it fill pages: "vec" or "amx".

    `page_shape` is (heads, tokens, 2 * head size). What fits no packing that kvmarket can convert
    is named after the instruction set, with "-unproven".
    """
    unproven = f"{isa}-unproven"
    bits = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    if dtype not in bits or len(page_shape) != 3 or page_shape[2] % 2:
        return unproven
    from vllm import _custom_ops as ops

    heads, tokens, content = page_shape
    # Two pages, so that what a kernel does at a page's end is seen. Positive, finite numbers only.
    filled = torch.zeros((2, *page_shape), dtype=dtype)
    top = 0x7F00_0000 if bits[dtype] is torch.int32 else 0x7000
    source = torch.Generator().manual_seed(0)
    size = (2, 2 * tokens, heads, content // 2)
    keys, values = torch.randint(1, top, size, generator=source, dtype=bits[dtype]).view(dtype)
    parts = filled.view(2, heads, 2 * tokens, content // 2).chunk(2, dim=2)
    try:
        ops.cpu_attn_reshape_and_cache(keys, values, *parts, torch.arange(2 * tokens), isa)
    except _KERNEL_ERRORS as error:
        logger.warning("kvmarket: cannot tell how pages are packed for %s: %s", isa, error)
        return unproven
    expected = torch.cat((keys, values), dim=2).view(bits[dtype])
    pages = filled.view(torch.uint8).numpy()
    for name in CPU_PACKINGS:
        layer = LayerLayout("probe", page_shape, pages[0].nbytes)
        layout = ChunkLayout(f"012/cpu-{name}", str(dtype), tokens, (layer,))
        try:
            found = canonical(layout, 0, pages)
        except LayoutMismatchError:
            continue
        if np.array_equal(found, expected.numpy().view(found.dtype)):
            return name
    return unproven


def latent_packing(page_shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Whether the CPU's kernel keeps latents token by token, by letting it fill pages.

    `page_shape` is (1, tokens, content): a token's latent, and its rotated key behind it.
    """
    from vllm import _custom_ops as ops

    _, tokens, content = page_shape
    filled = torch.zeros((2, tokens, content), dtype=dtype)
    written = torch.arange(2 * tokens * content).reshape(-1, content).remainder(251).to(dtype)
    # The slots in another order: a token's place is its slot's, whatever was written before.
    slots = torch.arange(2 * tokens).flip(0)
    latent = content // 2
    try:
        parts = written[:, :latent].contiguous(), written[:, latent:].contiguous()
        ops.amx_mla_concat_and_cache(*parts, filled, slots)
    except _KERNEL_ERRORS as error:
        logger.warning("kvmarket: cannot tell how latents are packed: %s", error)
        return UNPROVEN_LATENT
    return TOKENS if torch.equal(filled.view(-1, content), written.flip(0)) else UNPROVEN_LATENT


class PagedCache:
    """Every layer's pages of one rank; the only code that touches vLLM's KV memory.

    Callers own the blocks that they name. Not synchronised: different threads may copy different
    blocks at once.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_caches: dict[str, torch.Tensor],
        groups: Sequence[CacheGroup],
        num_blocks: int,
    ) -> None:
        number = {name: index for index, group in enumerate(groups) for name in group.layers}
        # Layers of one group at one address share their KV and are one entry. Layers of different
        # groups lie at one address too, and are different.
        unique = {
            (number[name], tensor.data_ptr()): (name, _blocks(tensor, num_blocks))
            for name, tensor in kv_caches.items()
            if name in number
        }
        self.group_of = [group for group, _ in unique]
        self.is_plain = is_plain(groups)
        self.rows = [byte_rows(name, tensor) for name, tensor in unique.values()]
        self.device = next(iter(unique.values()))[1].device
        states = {
            name: state
            for group in groups
            for name, state in zip(group.layers, group.states, strict=False)
        }
        attention = {name: each for name, each in unique.values() if name not in states}
        block_tokens = next(
            (group.block_tokens for group in groups if group.kind is not GroupKind.STATE), 1
        )
        parallel = vllm_config.parallel_config
        copies = replicas(groups, parallel.tensor_parallel_size)
        # Of ranks that have the same pages, the first one stores them.
        self.is_stored_here = parallel.rank % copies == 0
        tag, dtype = f"none/{self.device.type}", "uint8"
        if attention:
            tag = layout_tag(vllm_config, attention, block_tokens, copies)
            dtype = str(next(iter(attention.values())).dtype).removeprefix("torch.")
        self.layout = ChunkLayout(
            tag=tag,
            dtype=dtype,
            block_tokens=block_tokens,
            layers=tuple(
                LayerLayout(
                    name=name,
                    page_shape=tuple(tensor.shape[1:]),
                    page_bytes=tensor[0].numel() * tensor.element_size(),
                    state=states.get(name, ""),
                )
                for name, tensor in unique.values()
            ),
            rank=parallel.rank // copies,
            world_size=parallel.world_size // copies,
        )
        self._host: list[Bytes] | None = None
        if self.device.type == "cpu":
            self._host = [rows.numpy() for rows in self.rows]

    @property
    def layer_count(self) -> int:
        """The number of layers that do not share another layer's pages."""
        return len(self.rows)

    @property
    def on_host(self) -> bool:
        """Whether pages can be copied in place, without a device in between."""
        return self._host is not None

    def host_pages(self, layer: int, block_ids: Sequence[int]) -> list[Bytes]:
        """The pages themselves, writable, uint8 (page_bytes,); only when `on_host`.

        Blocks that lie side by side come as one longer run.
        """
        assert self._host is not None
        rows = self._host[layer]
        if rows.strides[0] != rows.shape[1]:
            return [rows[block] for block in block_ids]
        return [rows[start:end].reshape(-1) for start, end in runs(block_ids)]


def _blocks(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A layer's cache as (blocks, heads, tokens, content), by vLLM's blocks of its manager.

    A latent has no heads, and counts as one.
    """
    blocks = group_kernel_blocks(tensor, num_blocks)
    return blocks.unsqueeze(1) if blocks.dim() == 3 else blocks


def runs(block_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring block ids as half-open ranges, in order: [4, 5, 9] -> [(4, 6), (9, 10)]."""
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(block_ids)) if b != a + 1]
    starts = [0, *cuts]
    ends = [*cuts, len(block_ids)]
    return [
        (block_ids[s], block_ids[e - 1] + 1) for s, e in zip(starts, ends, strict=True) if e > s
    ]
