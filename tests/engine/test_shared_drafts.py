"""Instances draft from what siblings said elsewhere, and from earlier responses to the same prompt."""

import dataclasses

import numpy as np

from seer_jax.config.schema import RolloutConfig, SpeculationConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import SamplingParams
from seer_jax.engine.cluster import LocalCluster
from seer_jax.engine.engine import Engine
from seer_jax.engine.rollout import RolloutRunner
from tests.engine import tiny

# Cold sampling makes siblings say the same, so that drafts are often right.
COLD = SamplingParams(max_tokens=32, temperature=0.3)
CONFIG = dataclasses.replace(tiny.CONFIG, deterministic=True)
SETTINGS = RolloutConfig(chunk_size=8, prefetch_chunks=1)


def make_runner(**speculation: object) -> RolloutRunner:
    fields = {"mode": "grouped", "budget": "fixed", "min_probability": 0.0, "sync_interval_s": 1e-9} | speculation
    config = SpeculationConfig(**fields)
    engines = [Engine(tiny.MODEL, tiny.params(), CONFIG, speculation=config, instance_id=i) for i in range(2)]
    return RolloutRunner(LocalCluster(engines, config), RolloutDriver(make_policy("seer", SETTINGS)))


def test_siblings_on_other_instances_are_drafted_from() -> None:
    groups = tiny.groups(3, 6, COLD)
    plain = make_runner(mode="off").run(groups).stats
    alone, shared = (make_runner(draft_servers=n).run(groups).stats for n in (0, 1))
    assert plain.output_sha256 == alone.output_sha256 == shared.output_sha256
    assert shared.accepted_tokens > 1.1 * alone.accepted_tokens > 0
    assert shared.mean_acceptance_length > alone.mean_acceptance_length > plain.mean_acceptance_length == 1


def test_responses_of_the_last_iteration_are_remembered_if_asked_for() -> None:
    # One greedy response a prompt, so that only the memory can help; the same prompts again under other names, and
    # weights so little different that they say the same.
    groups = tiny.groups(3, 1, dataclasses.replace(COLD, temperature=0.0))
    weights = tiny.params() | {"lm_head": np.asarray(tiny.params()["lm_head"]) * np.float32(1.001)}
    again = [dataclasses.replace(group, group_id=group.group_id + 10, iteration=1) for group in groups]
    results = []
    for memory_tokens in (0, 10_000):
        runner = make_runner(memory_tokens=memory_tokens)
        runner.run(groups)
        results.append(runner.run(again, policy_version=1, get_params=lambda: weights).stats)
    forgetful, mindful = results
    assert forgetful.output_sha256 == mindful.output_sha256
    assert mindful.mean_acceptance_length > 1.3 * forgetful.mean_acceptance_length
