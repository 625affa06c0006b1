"""`chain_sum`: add up a list of signed digits modulo 100, writing every running total.

Made to be what Seer is about, at a size that a model of one million parameters learns in minutes: responses are
chains of thought whose length is heavy-tailed over prompts and nearly equal within a group, and the reward can be
checked. Every digit carries a label (a, b, ... z, A, ... Z) which the response repeats, so that finding the next
digit is copying (an induction task) and only the addition has to be known.

Prompt:  `a+7b-5c+3?`
Careful: `a+7=07 b-5=02 c+3=05 #05`   one digit a step
Hasty:   `a+7b-5=02 c+3=05 #05`       two digits a step: shorter, and harder to get right
"""

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seer_jax.models.config import DecoderConfig
from seer_jax.train.tasks.task import Prompt, RewardFunction, Split
from seer_jax.train.tokenizer import check_model_reads_bytes, encode

LABELS = string.ascii_letters
MIN_OPERANDS = 2
MAX_OPERANDS = len(LABELS)
MODULUS = 100

MEDIAN_OPERANDS = 9.0
SIGMA_OPERANDS = 0.75
"""Number of digits = median x exp(sigma x normal), clipped: mean 12, one prompt in a hundred reaches the maximum."""

HELDOUT_SHARE = 1 / 8
"""Share of all possible prompts that is held out, by the hash of the text."""


def score_answer(prompt: str, response: str, record: Mapping[str, Any]) -> float:
    """Give 1.0 if the text after the last `#` is the true answer, else 0.0.

    Args:
        prompt: Unused, part of the reward signature.
        response: Anything a model wrote, truncated or garbage included.
        record: Holds `answer`, two digits.

    Returns:
        1.0 or 0.0.
    """
    _, marker, answer = response.rpartition("#")
    return float(marker == "#" and answer == record["answer"])


@dataclass(frozen=True, kw_only=True)
class ChainSum:
    """The task; `reward_function` is its own unless the configuration names another."""

    reward_function: RewardFunction = score_answer

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt with as many digits as there are labels."""
        return len(make_prompt([1] * MAX_OPERANDS).token_ids)

    def make_prompts(self, seed: int, split: Split, count: int, start: int = 0) -> list[Prompt]:
        """Generate prompts `start` to `start + count - 1` of a split, each from its own random stream."""
        return [make_prompt(draw_operands(seed, split, i)) for i in range(start, start + count)]

    def check_tokenizer(self, model: DecoderConfig) -> None:
        """Refuse a model that does not read bytes."""
        check_model_reads_bytes(model, "data.task")


def split_of(text: str) -> Split:
    """Tell which split a prompt belongs to: a property of its text, so that no seed can mix the two."""
    first_byte = hashlib.blake2b(text.encode(), digest_size=1).digest()[0]
    return "heldout" if first_byte < 256 * HELDOUT_SHARE else "train"


def draw_operands(seed: int, split: Split, index: int) -> list[int]:
    """Draw the signed digits of one prompt: redrawn until the prompt falls into the split."""
    rng = np.random.default_rng([seed, index, split == "heldout"])
    while True:
        count = round(MEDIAN_OPERANDS * np.exp(SIGMA_OPERANDS * rng.standard_normal()))
        count = min(max(count, MIN_OPERANDS), MAX_OPERANDS)
        operands = (rng.integers(1, 10, count) * rng.choice([-1, 1], count)).tolist()
        if split_of(format_prompt(operands)) == split:
            return operands


def format_prompt(operands: Sequence[int]) -> str:
    """Write the prompt: every digit behind its label and sign, then `?`."""
    return "".join(format_operand(i, value) for i, value in enumerate(operands)) + "?"


def format_operand(index: int, value: int) -> str:
    """Write one labelled signed digit, such as `c-5`."""
    return f"{LABELS[index]}{value:+d}"


def make_prompt(operands: Sequence[int]) -> Prompt:
    """Build the prompt of a list of signed digits, with its answer in the record."""
    text = format_prompt(operands)
    record = {"answer": f"{sum(operands) % MODULUS:02d}", "num_operands": len(operands)}
    return Prompt(text=text, token_ids=encode(text, add_bos=True), record=record)


def write_chain(operands: Sequence[int], step_size: int, error_rate: float, rng: np.random.Generator) -> str:
    """Write a response as the base model's training data has it.

    Args:
        operands: The signed digits of the prompt.
        step_size: Digits added per written step: 1 is careful, 2 is hasty.
        error_rate: Probability that a step's total is off by 1 or by 10; the chain goes on from the wrong total.
        rng: Source of the errors.

    Returns:
        The chain, ending in `#` and the last total.
    """
    total, steps = 0, []
    for first in range(0, len(operands), step_size):
        taken = operands[first : first + step_size]
        slip = int(rng.choice([-10, -1, 1, 10])) if rng.random() < error_rate else 0
        total = (total + sum(taken) + slip) % MODULUS
        steps.append("".join(format_operand(first + i, v) for i, v in enumerate(taken)) + f"={total:02d} ")
    return "".join(steps) + f"#{total:02d}"
