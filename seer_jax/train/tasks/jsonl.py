"""`jsonl`: prompts from a file of the user's, judged by a function of the user's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seer_jax.core.errors import ConfigError
from seer_jax.models.config import DecoderConfig
from seer_jax.train.tasks.task import Prompt, RewardFunction, Split
from seer_jax.train.tokenizer import check_model_reads_bytes, decode, encode

RECORD_HINT = 'every line must be like {"prompt": "1+1=", "answer": "2"} or {"prompt_token_ids": [1, 5], "answer": "2"}'


@dataclass(frozen=True, kw_only=True)
class JsonlTask:
    """Prompts read from a file.

    Attributes:
        path: The file.
        train: Prompts to train on, at least one.
        heldout: Prompts to measure on, never trained on.
        reward_function: Judges a response.
    """

    path: str
    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    reward_function: RewardFunction

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt in the file."""
        return max(len(prompt.token_ids) for prompt in self.train + self.heldout)

    def make_prompts(self, seed: int, split: Split, count: int, start: int = 0) -> list[Prompt]:
        """Give prompts of a split.

        The train split is endless: each pass over the file is a new shuffle. The held-out split is kept in the order
        of the file and does not repeat.

        Args:
            seed: Seed of the shuffles.
            split: Which prompts.
            count: Number of prompts wanted.
            start: Position of the first one.

        Returns:
            The prompts.

        Raises:
            ValueError: If more held-out prompts are asked for than were kept.
        """
        if split == "heldout":
            if start + count > len(self.heldout):
                raise ValueError(f"held-out prompts {start}..{start + count - 1} asked for, {len(self.heldout)} exist")
            return list(self.heldout[start : start + count])
        size = len(self.train)
        passes = range(start // size, (start + count - 1) // size + 1)
        order = [i for p in passes for i in np.random.default_rng([seed, p]).permutation(size)]
        offset = start - passes.start * size
        return [self.train[i] for i in order[offset : offset + count]]

    def check_tokenizer(self, model: DecoderConfig) -> None:
        """Refuse text if the model does not read bytes, and token ids that are outside its vocabulary.

        Raises:
            ConfigError: Names the file, and the record if it is a token id.
        """
        for number, prompt in enumerate(self.train + self.heldout, start=1):
            if _is_text(prompt.record):
                check_model_reads_bytes(model, "data.path")
            elif (largest := int(prompt.token_ids.max())) >= model.vocab_size:
                problem = f"{self.path!r} record {number} holds token id {largest}, vocab_size is {model.vocab_size}"
                raise ConfigError("data.path", problem, "tokenize the prompts with the tokenizer of the model")


def load_jsonl_task(path: str, reward_function: RewardFunction, heldout_prompts: int) -> JsonlTask:
    """Read a JSONL file; the last `heldout_prompts` records are held out.

    Args:
        path: One JSON object a line; blank lines are skipped.
        reward_function: Judges a response.
        heldout_prompts: Records kept for measuring.

    Returns:
        The task.

    Raises:
        ConfigError: If the file is missing, empty, too short, or a line is no usable record.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "data.path", f"cannot read {path!r}: {error}", "give a readable JSONL file in UTF-8"
        ) from error
    prompts = [_read_record(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ConfigError("data.path", f"{path!r} holds no record", RECORD_HINT)
    if len(prompts) <= heldout_prompts:
        raise ConfigError(
            "data.heldout_prompts",
            f"{heldout_prompts} of the {len(prompts)} records of {path!r} leave none to train on",
            f"hold out at most {len(prompts) - 1}, or add records",
        )
    first_heldout = len(prompts) - heldout_prompts
    return JsonlTask(
        path=path,
        train=tuple(prompts[:first_heldout]),
        heldout=tuple(prompts[first_heldout:]),
        reward_function=reward_function,
    )


def _read_record(path: str, number: int, line: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError("data.path", f"{path!r} line {number} is no JSON: {error}", RECORD_HINT) from error
    if not isinstance(record, Mapping):
        raise ConfigError("data.path", f"{path!r} line {number} is no JSON object", RECORD_HINT)
    token_ids = _read_token_ids(record)
    if token_ids is None:
        problem = f"{path!r} line {number} has no text `prompt` and no `prompt_token_ids` of non-negative integers"
        raise ConfigError("data.path", problem, RECORD_HINT)
    return Prompt(text=str(record.get("prompt", decode(token_ids))), token_ids=token_ids, record=record)


def _read_token_ids(record: Mapping[str, Any]) -> np.ndarray | None:
    if _is_text(record):
        text = record.get("prompt")
        return encode(text, add_bos=True) if isinstance(text, str) and text else None
    given = record["prompt_token_ids"]
    usable = isinstance(given, list) and given and all(type(i) is int and 0 <= i < 2**31 for i in given)
    return np.asarray(given, np.int32) if usable else None


def _is_text(record: Mapping[str, Any]) -> bool:
    return record.get("prompt_token_ids") is None
