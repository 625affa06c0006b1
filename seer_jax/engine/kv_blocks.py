"""How the KV of a request is cut into the blocks of a pool, and what they are called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kernels_pallas.mla_attention import pad_row_width
from seer_jax.config.schema import EngineConfig
from seer_jax.core.types import RequestId, TokenIds
from seer_jax.kvpool import BlockKey, block_key, chain_keys, fingerprint
from seer_jax.models.config import DecoderConfig

BLOCK_TOKENS = 32
"""Tokens of a block, or one page if that is more. Half of it is sent again per chunk, the last block being partial; the
pool's 50 to 100 us a block are then less than a tenth of the copy for Moonlight (1 MB) and Kimi-K2 (2.2 MB)."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Shape and names of blocks; the same on instances of any tensor parallelism, since each device has whole rows.

    Attributes:
        page_shape: [num_layers, page_size, row_width].
        dtype: Of the cache.
        model: Digest of the model's shapes and all of the above.
    """

    page_shape: tuple[int, int, int]
    dtype: np.dtype
    model: bytes

    @classmethod
    def of(cls, model_config: DecoderConfig, config: EngineConfig, params: Mapping[str, Any]) -> "BlockLayout":
        """That of an engine on this process's devices.

        Args:
            model_config: Shapes of the model.
            config: Tokens of a page, type of the cache.
            params: Weights, whose type the cache has if `kv_dtype` is auto.
        """
        layers, page = model_config.num_hidden_layers, config.page_size
        dtype = np.dtype(params["embed"].dtype if config.kv_dtype == "auto" else config.kv_dtype)
        row = pad_row_width(model_config.latent_width, jax.default_backend())
        model = fingerprint(model=repr(model_config), dtype=dtype.name, layers=layers, page=page, row=row)
        return cls(page_shape=(layers, page, row), dtype=dtype, model=model)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all layers together."""
        return int(np.prod(self.page_shape)) * self.dtype.itemsize

    @property
    def pages_per_block(self) -> int:
        """Pages of a full block."""
        return max(1, BLOCK_TOKENS // self.page_shape[1])

    @property
    def block_tokens(self) -> int:
        """Tokens of a full block."""
        return self.pages_per_block * self.page_shape[1]

    @property
    def block_bytes(self) -> int:
        """Bytes of a full block."""
        return self.pages_per_block * self.page_bytes

    def keys(self, request_id: RequestId, token_ids: TokenIds, policy_version: int) -> list[BlockKey]:
        """Name a request's blocks. They are its own, even where a sibling has said the same: it drops them."""
        owner = f"{request_id.group_id}/{request_id.index}".encode()
        names = {"epoch": policy_version, "layout": self.model + owner}
        keys = chain_keys(token_ids, self.block_tokens, **names)
        rest = token_ids[len(keys) * self.block_tokens :]
        return [*keys, block_key(keys[-1] if keys else None, rest, **names)] if len(rest) else keys

    def cut(self, pages: np.ndarray) -> Sequence[np.ndarray]:
        """Views of the pages of each block, the first page being the first of a block."""
        return [pages[i : i + self.pages_per_block] for i in range(0, len(pages), self.pages_per_block)]
