"""Byte-level tokenizer: a token is a UTF-8 byte, plus three special ids.

No vocabulary file, no merges, loss-free on any text: enough for the built-in tasks and for small models trained on
them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from seer_jax.core.errors import ConfigError
from seer_jax.models.config import DecoderConfig

BOS_ID = 256
EOS_ID = 257
PAD_ID = 258
NUM_TOKENS = 259
"""Ids in use; a model's `vocab_size` may be larger."""


def encode(text: str, *, add_bos: bool = False, add_eos: bool = False) -> Int32[np.ndarray, " tokens"]:
    """Turn text into token ids.

    Args:
        text: Any text.
        add_bos: Put `BOS_ID` in front, as every prompt has it.
        add_eos: Put `EOS_ID` behind, as every finished response has it.

    Returns:
        One id per UTF-8 byte, plus the special ids asked for.
    """
    ids = [BOS_ID] * add_bos + list(text.encode()) + [EOS_ID] * add_eos
    return np.asarray(ids, np.int32)


def decode(token_ids: Sequence[int] | np.ndarray) -> str:
    """Turn token ids back into text.

    A sampled response may hold anything, so this never fails: ids that are no byte are left out, and bytes that
    are not UTF-8 become the replacement character.

    Args:
        token_ids: Token ids, special ones allowed.

    Returns:
        The text.
    """
    return bytes(int(i) for i in token_ids if 0 <= i < BOS_ID).decode(errors="replace")


def check_model_reads_bytes(model: DecoderConfig, setting: str) -> None:
    """Refuse to give byte-tokenized text to a model that was trained on other tokens.

    Args:
        model: The model; one trained on bytes ends its texts with `EOS_ID`.
        setting: The setting that the text comes from, for the error.

    Raises:
        ConfigError: If the model has another tokenizer.
    """
    if EOS_ID not in model.eos_token_id or model.vocab_size < NUM_TOKENS:
        raise ConfigError(
            setting,
            f"gives text, which is byte-tokenized and ends with token {EOS_ID}, but the model has another tokenizer: "
            f"vocab_size {model.vocab_size}, eos_token_id {list(model.eos_token_id)}",
            "use data.task=jsonl with prompt_token_ids and a reward that reads record['response_token_ids']",
        )
