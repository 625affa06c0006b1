"""Rewards of a batch of samples. A reward function that crashes or hangs costs its own sample, never the batch."""

import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType

import numpy as np
from jaxtyping import Float32

from seer_jax.core.types import RequestId, Sample, TokenIds
from seer_jax.train.tasks.task import Prompt, RewardFunction, Task
from seer_jax.train.tokenizer import decode


class OverdueError(BaseException):
    """A call took too long. No `Exception`, so that the function does not take it for a failure of its own."""


@dataclass(frozen=True, kw_only=True)
class RewardFailure:
    """A sample that could not be judged.

    Attributes:
        request_id: Group and index of the sample.
        error: Traceback of the crash or of where time was up, or what was wrong with the value returned.
    """

    request_id: RequestId
    error: str


def compute_rewards(
    task: Task, prompts: Mapping[int, Prompt], samples: Sequence[Sample], timeout_s: float
) -> tuple[Float32[np.ndarray, " samples"], tuple[RewardFailure, ...]]:
    """Judge every sample, one after the other in this process.

    Args:
        task: Gives the reward function.
        prompts: The prompt of every group id.
        samples: Finished responses, in any order.
        timeout_s: Longest that the function may take for a sample, see `call_within`.

    Returns:
        The rewards in the order of `samples`, nan where there is none (such a sample must be left out of its group's
        advantages and of the loss), and one failure for each nan.
    """
    rewards = np.full(len(samples), np.nan, np.float32)
    failures = []
    for i, sample in enumerate(samples):
        prompt = prompts[sample.request_id.group_id]
        try:
            reward = call_within(timeout_s, partial(judge, task.reward_function, prompt, sample.token_ids))
        # The function is the user's: whatever it raises is a result to report, not a state of ours to unwind.
        except (Exception, OverdueError):
            failures.append(RewardFailure(request_id=sample.request_id, error=traceback.format_exc()))
            continue
        if math.isfinite(reward):
            rewards[i] = reward
        else:
            error = f"the reward function returned {reward}, not a finite number"
            failures.append(RewardFailure(request_id=sample.request_id, error=error))
    return rewards, tuple(failures)


def judge(reward_function: RewardFunction, prompt: Prompt, response_token_ids: TokenIds) -> float:
    """Call a reward function.

    It gets the response as text, as the byte tokenizer reads it, and a record of its own: the prompt's, plus
    `prompt_token_ids` and `response_token_ids` (lists of ints, the stop token included), to be decoded by the
    function if the model has another tokenizer. They take the place of fields of the same name.

    Args:
        reward_function: Judges a response.
        prompt: The prompt.
        response_token_ids: int32 [num_tokens], stop token included.

    Returns:
        What the function returned, as a float.

    Raises:
        Exception: Whatever the function raises, and if it returned no number.
    """
    record = {
        **prompt.record,
        "prompt_token_ids": prompt.token_ids.tolist(),
        "response_token_ids": response_token_ids.tolist(),
    }
    return float(reward_function(prompt.text, decode(response_token_ids), record))


def call_within(timeout_s: float, call: Callable[[], float]) -> float:
    """Call something, and interrupt it by SIGALRM, as Ctrl-C would, when its time is up.

    Only the main thread can be interrupted: in another one the call takes as long as it takes. So does one that is in C
    code that looks for no signals, or that catches `BaseException` and goes on. An alarm that was set before is put
    off until after the call.

    Args:
        timeout_s: Seconds.
        call: Takes nothing.

    Returns:
        What it returned.

    Raises:
        OverdueError: Time was up.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()

    def interrupt(_: int, __: FrameType | None) -> None:
        raise OverdueError(f"the reward function took longer than train.reward_timeout_s={timeout_s:g}")

    handler = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    delay_s, interval_s = signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        try:
            return call()
        finally:
            # The alarm goes off once at most, perhaps here; what must be done in any case is done below.
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
        if delay_s:
            left_s = max(1e-3, delay_s - (time.monotonic() - started))
            signal.setitimer(signal.ITIMER_REAL, left_s, interval_s)
