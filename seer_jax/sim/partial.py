"""Partial rollout (APRIL), the off-policy rival: issue twice as many requests, stop when enough have finished."""

from collections import deque

import numpy as np

from seer_jax.sim.simulation import SimRequests, SimResult
from seer_jax.sim.systems import SYSTEMS, draw_requests, simulate
from seer_jax.sim.workloads import Workload

OVER_ISSUE = 2
FIRST_SEED = 1_000_000
"""Far from the seeds of fits and of other experiments."""
NUM_WARM_UP, NUM_MEASURED = 3, 3
"""Iterations until the carried-over requests are in a steady state, and those that count."""


def simulate_partial(workload: Workload, seed: int) -> dict[str, float]:
    """Seer beside partial rollout on veRL, several iterations each, on prompts of the same law.

    They are not the same prompts: what partial rollout trains on was issued in other iterations.

    In every iteration of partial rollout `OVER_ISSUE` times the requests are in flight; when as many have finished as
    an iteration needs, the rest is cut off and goes on in the next one under new weights: its KV is computed again, its
    tokens are off-policy.

    Returns:
        seer_gain: tokens/s that Seer trains on over those of partial rollout. mean_length_share: mean length of what
        partial rollout trained on in the measured iterations over the true mean: below 1, long answers are put off.
        carried_share: share of its tokens that older weights produced.
    """
    verl, seer = SYSTEMS["verl"], SYSTEMS["seer"]
    fresh = deque[int]()
    next_seed = first_seed = FIRST_SEED + 1000 * seed
    carried: list[tuple[int, int]] = []  # (true length, generated so far)
    tokens, seconds, carried_tokens, num_trained = 0, 0.0, 0, 0
    for iteration in range(NUM_WARM_UP + NUM_MEASURED):
        while len(carried) + len(fresh) < OVER_ISSUE * workload.num_requests:
            fresh.extend(int(length) for length in draw_requests(workload, next_seed).lengths.ravel())
            next_seed += 1
        num_new = OVER_ISSUE * workload.num_requests - len(carried)
        issued = carried + [(fresh.popleft(), 0) for _ in range(num_new)]
        result = simulate(workload, verl, _requests(workload, issued), stop_after=workload.num_requests)
        finished = [issued[i] for i in range(len(issued)) if (i, 0) not in result.unfinished]
        if iteration >= NUM_WARM_UP:
            tokens += sum(length for length, _ in finished)
            carried_tokens += sum(done for _, done in finished)
            num_trained += len(finished)
            seconds += result.rollout_time_s
        carried = [
            (length, done + result.unfinished.get((i, 0), 0))
            for i, (length, done) in enumerate(issued)
            if (i, 0) in result.unfinished
        ]
    runs: list[SimResult] = [
        simulate(workload, seer, draw_requests(workload, first_seed + i), seed=seed) for i in range(NUM_MEASURED)
    ]
    seer_rate = sum(run.generated_tokens for run in runs) / sum(run.rollout_time_s for run in runs)
    return {
        "seer_gain": seer_rate / (tokens / seconds),
        "mean_length_share": tokens / num_trained / workload.lengths.mean,
        "carried_share": carried_tokens / tokens,
    }


def _requests(workload: Workload, issued: list[tuple[int, int]]) -> SimRequests:
    """One request a group, what was generated before being part of its prompt."""
    done = np.array([done for _, done in issued])
    lengths = np.array([length for length, _ in issued])
    return SimRequests(
        lengths=(lengths - done)[:, None],
        prompts=workload.prompt_tokens + done,
        limits=workload.lengths.limit - done,
    )
