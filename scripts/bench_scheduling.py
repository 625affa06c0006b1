"""What scheduling costs on the host, and what an order is worth: the real driver over a toy cluster without engines.

    python scripts/bench_scheduling.py --seeds 3 length_estimator=posterior

A running chunk yields one token per time unit whatever runs beside it, and one that reserves no pages needs none. By
default an iteration of the paper's size (32 instances, 400 groups of 8), lengths an eighth of the paper's, pages for 20
to 40 requests an instance.
"""

import argparse
import heapq
import itertools
import time
from collections.abc import Mapping

import numpy as np
import yaml

from seer_jax.config.decode import decode
from seer_jax.config.schema import RolloutConfig
from seer_jax.core.commands import Command, EmitSample, StartChunk
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import ChunkFinished, Event, GroupsSubmitted, InstanceJoined
from seer_jax.core.scheduling import make_estimator, make_policy
from seer_jax.core.types import InstanceInfo, RequestChunk, RequestId, RolloutGroup, SamplingParams

LIMIT, PROMPT, PAGE_SIZE = 8192, 64, 16
SD_BETWEEN, SD_WITHIN = 0.411, 0.357
"""Of log lengths: correlation 0.57 inside a group, as measured with AIME problems."""


def draw_lengths(num_groups: int, group_size: int, seed: int) -> dict[RequestId, int]:
    """Draw true lengths: log-normal between groups times log-normal within, a third of the limit on average."""
    rng = np.random.default_rng(seed)
    logs = np.log(LIMIT / 3) - (SD_BETWEEN**2 + SD_WITHIN**2) / 2 + SD_BETWEEN * rng.standard_normal((num_groups, 1))
    lengths = np.clip(np.exp(logs + SD_WITHIN * rng.standard_normal((num_groups, group_size))), 1, LIMIT).astype(int)
    return {RequestId(*index): int(length) for index, length in np.ndenumerate(lengths)}


class ToyCluster:
    """Carries out a driver's commands and times `handle`."""

    def __init__(self, driver: RolloutDriver, infos: list[InstanceInfo], true_lengths: Mapping[RequestId, int]) -> None:
        self.driver, self.true_lengths = driver, true_lengths
        self.now, self.handle_s, self.num_decisions = 0, 0.0, 0
        self.finish_times: list[int] = []
        self._running: list[tuple[int, int, int, RequestChunk]] = []
        self._sent: dict[int, dict[RequestId, RequestChunk]] = {info.instance_id: {} for info in infos}
        self._serial = itertools.count()
        for info in infos:
            driver.handle(InstanceJoined(info=info, policy_version=0))

    def run(self, groups: tuple[RolloutGroup, ...]) -> None:
        """Run one iteration to its end."""
        self._handle(GroupsSubmitted(groups=groups, policy_version=0))
        while self._running:
            self.now, _, instance_id, chunk = heapq.heappop(self._running)
            start = len(chunk.token_ids) - chunk.num_prompt_tokens
            end = min(start + chunk.max_chunk_tokens, self.true_lengths[chunk.request_id])
            is_done = end == self.true_lengths[chunk.request_id]
            result = ChunkFinished(
                instance_id=instance_id,
                request_id=chunk.request_id,
                chunk_index=chunk.chunk_index,
                token_ids=np.zeros(end - start, np.int32),
                logprobs=np.zeros(end - start, np.float32),
                finish_reason="stop" if is_done else "chunk",
                policy_version=0,
            )
            self._handle(result, instance_id)

    def _handle(self, event: Event, *instance_ids: int) -> None:
        started = time.thread_time()
        commands: list[Command] = self.driver.handle(event)
        self.handle_s += time.thread_time() - started
        self.finish_times.extend(self.now for command in commands if isinstance(command, EmitSample))
        starts = [command for command in commands if isinstance(command, StartChunk)]
        self.num_decisions += len(starts)
        for start in starts:
            self._sent[start.instance_id][start.chunk.request_id] = start.chunk
        for instance_id in {*instance_ids, *(start.instance_id for start in starts)}:
            queued = self.driver.loads[instance_id].queued
            for request_id in [name for name in self._sent[instance_id] if name not in queued]:
                chunk = self._sent[instance_id].pop(request_id)
                generated = len(chunk.token_ids) - chunk.num_prompt_tokens
                num_new = min(chunk.max_chunk_tokens, self.true_lengths[request_id] - generated)
                heapq.heappush(self._running, (self.now + num_new, next(self._serial), instance_id, chunk))


def main() -> None:
    """Run and print one line a seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="seer")
    parser.add_argument("--instances", type=int, default=32)
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--pages", type=int, default=4800, help="per instance")
    parser.add_argument("--slots", type=int, default=64, help="per instance")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("options", nargs="*", help="settings of RolloutConfig, name=value")
    args = parser.parse_args()
    defaults = {"chunk_size": 512, "prefetch_chunks": 0}
    options = {name: yaml.safe_load(value) for name, value in (option.split("=") for option in args.options)}
    config = decode(RolloutConfig, defaults | options, base=RolloutConfig())
    sampling = SamplingParams(max_tokens=LIMIT)
    groups = tuple(
        RolloutGroup(group_id=g, prompt_token_ids=np.zeros(PROMPT, np.int32), group_size=8, sampling=sampling)
        for g in range(args.groups)
    )
    infos = [
        InstanceInfo(
            instance_id=i,
            num_total_pages=args.pages,
            page_size=PAGE_SIZE,
            max_num_seqs=args.slots,
            max_model_len=LIMIT + PROMPT,
        )
        for i in range(args.instances)
    ]
    for seed in range(args.seeds):
        true_lengths = draw_lengths(args.groups, 8, seed)
        policy = make_policy(args.policy, config, true_lengths)
        driver = RolloutDriver(policy, make_estimator(args.policy, config, true_lengths))
        cluster = ToyCluster(driver, infos, true_lengths)
        cluster.run(groups)
        num_tail = len(true_lengths) // 10
        print(
            f"seed {seed}: {cluster.num_decisions} decisions, {1e6 * cluster.handle_s / cluster.num_decisions:.1f} us "
            f"each in handle; makespan {cluster.now}, tail {cluster.now - cluster.finish_times[-num_tail - 1]}; "
            f"fired {dict(driver.firings)}"
        )


if __name__ == "__main__":
    main()
