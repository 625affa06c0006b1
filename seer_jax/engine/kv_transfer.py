"""Copies of KV pages: to the host and back, so that a paused request continues on any instance, and on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from seer_jax.core.errors import TransferError
from seer_jax.core.step_shapes import geometric_buckets, pick_bucket
from seer_jax.engine.parallel import BY_RANK, RANKS, by_rank, count_ranks

Caches = list[jax.Array]

PINNED_HOST = "pinned_host"
HOST_PLATFORMS = ("cpu",)
"""Whose arrays numpy reads where they are; a copy to pinned memory would be one more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HostKV:
    """KV pages of one request on the host.

    Attributes:
        pages: [num_pages, num_layers, page_size, row_width]; slots past `num_tokens` hold garbage. Pages come first, so
            that those of a request are one piece of memory whatever they are padded to.
        num_tokens: Tokens covered, from position 0.
        policy_version: Weights that produced it.
        num_saved_blocks: How many of its first blocks a shared pool has too.
        first_page: Pages that come before `pages`; who asked for it has them already.
    """

    pages: np.ndarray
    num_tokens: int
    policy_version: int
    num_saved_blocks: int = 0
    first_page: int = 0


class KVTransfer:
    """Copies pages within device caches and between them and the host, at a few bucketed sizes.

    Args:
        max_pages: Of one request.
        mesh: Over which the caches lie as `parallel.place` says; None = one device.
    """

    def __init__(self, max_pages: int, mesh: Mesh | None = None) -> None:
        self._buckets = geometric_buckets(min(4, max_pages), max_pages)
        self._num_ranks = count_ranks(mesh)
        self._gather, self._scatter, self._copy = _programs(mesh if self._num_ranks > 1 else None)

    def warmup(self, caches: list[jax.Array]) -> list[jax.Array]:
        """Compile every size by copying the garbage page to itself; returns the caches."""
        for bucket in self._buckets:
            pages = [0] * bucket
            caches = self.import_pages(caches, pages, np.asarray(self.export_pages(caches, pages)))
            caches = self.copy_pages(caches, [(0, 0)] * bucket)
        return caches

    def export_pages(self, caches: list[jax.Array], pages: list[int]) -> jax.Array:
        """Copy `pages` of one rank, in all layers, to an array on device, on its way to the host; does not wait for it.

        It goes to pinned memory where the device has such, else wherever jax takes it. Of a mesh one device sends.

        Returns:
            [at least num_pages, num_layers, page_size, row_width]; what is more is padding.
        """
        export = self._gather(caches, self._pad(pages))
        if self._num_ranks > 1:
            rank = pages[0] * self._num_ranks // caches[0].shape[0] if pages else 0
            first = rank * len(export) // self._num_ranks
            export = next(shard.data for shard in export.addressable_shards if shard.index[0].start == first)
        else:
            export = export.addressable_data(0)  # As the caches, whole on every device.
        if _has_pinned_host(export.device):
            return jax.device_put(export, export.sharding.with_memory_kind(PINNED_HOST))
        export.copy_to_host_async()
        return export

    def import_pages(self, caches: list[jax.Array], pages: list[int], data: np.ndarray) -> list[jax.Array]:
        """Write host pages into the (donated) caches; padding goes to the garbage page.

        Raises:
            TransferError: If the block has another layout than the caches.
        """
        expected = (len(pages), len(caches), *caches[0].shape[1:])
        if data.shape != expected or data.dtype != caches[0].dtype:
            raise TransferError(
                f"KV block is {data.dtype}{list(data.shape)}, caches take {caches[0].dtype}{list(expected)}"
            )
        padded_pages = self._pad(pages)
        padded = np.zeros((len(padded_pages), *expected[1:]), data.dtype)
        padded[: len(pages)] = data
        return self._scatter(caches, padded_pages, padded)

    def copy_pages(self, caches: list[jax.Array], copies: Sequence[tuple[int, int]]) -> list[jax.Array]:
        """Copy source page to target page in all layers of the (donated) caches; no target is also a source."""
        most = self._buckets[-1]
        for first in range(0, len(copies), most):
            sources, targets = zip(*copies[first : first + most], strict=True)
            caches = self._copy(caches, self._pad(sources), self._pad(targets))
        return caches

    def _pad(self, pages: Sequence[int]) -> np.ndarray:
        padded = np.zeros(pick_bucket(len(pages), self._buckets), np.int32)
        padded[: len(pages)] = pages
        return padded


def _has_pinned_host(device: jax.Device) -> bool:
    kinds = (memory.kind for memory in device.addressable_memories())
    return device.platform not in HOST_PLATFORMS and PINNED_HOST in kinds


@cache
def _programs(mesh: Mesh | None) -> tuple[Callable[..., jax.Array], Callable[..., Caches], Callable[..., Caches]]:
    """Gather, scatter and copy, jitted; engines of one process share them.

    On a mesh every rank takes part with the pages that are its own: what it gathers for others' is garbage, and what it
    writes for them goes to its garbage page. The gathered pages are those of one rank after the other.
    """
    if mesh is None:
        return jax.jit(_gather), jax.jit(_scatter, donate_argnums=0), jax.jit(_copy, donate_argnums=0)
    everywhere, out_shardings = PartitionSpec(), by_rank(mesh)
    shard = partial(jax.shard_map, mesh=mesh, axis_names={RANKS}, out_specs=BY_RANK, check_vma=False)

    def gather(caches: Caches, pages: jax.Array) -> jax.Array:
        return _gather(caches, _own(pages, caches))

    def scatter(caches: Caches, pages: jax.Array, data: jax.Array) -> Caches:
        return _scatter(caches, _own(pages, caches), data)

    def copy(caches: Caches, sources: jax.Array, targets: jax.Array) -> Caches:
        return _copy(caches, _own(sources, caches), _own(targets, caches))

    return (
        jax.jit(shard(gather, in_specs=(BY_RANK, everywhere)), out_shardings=out_shardings),
        *(
            jax.jit(
                shard(write, in_specs=(BY_RANK, everywhere, everywhere)), donate_argnums=0, out_shardings=out_shardings
            )
            for write in (scatter, copy)
        ),
    )


def _own(pages: jax.Array, caches: Caches) -> jax.Array:
    """What a rank calls its own pages; others' become its garbage page."""
    num_pages = caches[0].shape[0]
    local = pages - jax.lax.axis_index(RANKS) * num_pages
    return jnp.where((local >= 0) & (local < num_pages), local, 0)


def _gather(caches: Caches, pages: jax.Array) -> jax.Array:
    return jnp.stack([cache[pages] for cache in caches], axis=1)


def _scatter(caches: Caches, pages: jax.Array, data: jax.Array) -> Caches:
    return [cache.at[pages].set(data[:, layer]) for layer, cache in enumerate(caches)]


def _copy(caches: Caches, sources: jax.Array, targets: jax.Array) -> Caches:
    return [cache.at[targets].set(cache[sources]) for cache in caches]
