"""Copies of KV pages: to the host and back, so that a paused request continues on any instance, and on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.core.errors import TransferError
from seer_jax.core.step_shapes import geometric_buckets, pick_bucket

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
    """Copies pages within device caches and between them and the host, at a few bucketed sizes."""

    def __init__(self, max_pages: int) -> None:
        self._buckets = geometric_buckets(min(4, max_pages), max_pages)

    def warmup(self, caches: list[jax.Array]) -> list[jax.Array]:
        """Compile every size by copying the garbage page to itself; returns the caches."""
        for bucket in self._buckets:
            pages = [0] * bucket
            caches = self.import_pages(caches, pages, np.asarray(self.export_pages(caches, pages)))
            caches = self.copy_pages(caches, [(0, 0)] * bucket)
        return caches

    def export_pages(self, caches: list[jax.Array], pages: list[int]) -> jax.Array:
        """Copy `pages` of all layers to one array on device, on its way to the host; does not wait for it.

        It goes to pinned memory where the device has such, else wherever jax takes it. Of a mesh one device sends.

        Returns:
            [at least num_pages, num_layers, page_size, row_width]; what is more is padding.
        """
        export = _gather(caches, self._pad(pages)).addressable_data(0)  # As the caches, whole on every device.
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
        return _scatter(caches, padded_pages, padded)

    def copy_pages(self, caches: list[jax.Array], copies: Sequence[tuple[int, int]]) -> list[jax.Array]:
        """Copy source page to target page in all layers of the (donated) caches; no target is also a source."""
        most = self._buckets[-1]
        for first in range(0, len(copies), most):
            sources, targets = zip(*copies[first : first + most], strict=True)
            caches = _copy(caches, self._pad(sources), self._pad(targets))
        return caches

    def _pad(self, pages: Sequence[int]) -> np.ndarray:
        padded = np.zeros(pick_bucket(len(pages), self._buckets), np.int32)
        padded[: len(pages)] = pages
        return padded


def _has_pinned_host(device: jax.Device) -> bool:
    kinds = (memory.kind for memory in device.addressable_memories())
    return device.platform not in HOST_PLATFORMS and PINNED_HOST in kinds


@jax.jit
def _gather(caches: list[jax.Array], pages: jax.Array) -> jax.Array:
    return jnp.stack([cache[pages] for cache in caches], axis=1)


@partial(jax.jit, donate_argnums=0)
def _scatter(caches: list[jax.Array], pages: jax.Array, data: jax.Array) -> list[jax.Array]:
    return [cache.at[pages].set(data[:, layer]) for layer, cache in enumerate(caches)]


@partial(jax.jit, donate_argnums=0)
def _copy(caches: list[jax.Array], sources: jax.Array, targets: jax.Array) -> list[jax.Array]:
    return [cache.at[targets].set(cache[sources]) for cache in caches]
