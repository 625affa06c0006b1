"""What a task is: prompts in two disjoint splits, and a reward for a response."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from seer_jax.models.config import DecoderConfig

Split = Literal["train", "heldout"]

RewardFunction = Callable[[str, str, Mapping[str, Any]], float]
"""`(prompt text, response text, record) -> reward`, larger is better; `rewards.judge` says what the record holds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A prompt and what its reward needs to know.

    Attributes:
        text: The prompt as text.
        token_ids: int32 [num_tokens], as the model reads it.
        record: Everything else that is known of the prompt, such as the true answer.
    """

    text: str
    token_ids: np.ndarray
    record: Mapping[str, Any]


@runtime_checkable
class Task(Protocol):
    """Prompts and their reward.

    Invariants: `make_prompts` depends on its arguments only; no prompt of the held-out split is ever in the train
    split, whatever the seed.
    """

    @property
    def reward_function(self) -> RewardFunction:
        """Judges a response."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt of both splits, whatever the seed."""
        ...

    def make_prompts(self, seed: int, split: Split, count: int, start: int = 0) -> list[Prompt]:
        """Give prompts `start` to `start + count - 1` of the endless sequence that `seed` and `split` name."""
        ...

    def check_tokenizer(self, model: DecoderConfig) -> None:
        """Check that the model knows the tokens of every prompt.

        Raises:
            ConfigError: If a token id is outside the vocabulary, or text is not what the model was trained on.
        """
        ...
