"""The controller's side of the shared KV pool: starts an owner on every node, and another when one dies."""

import logging
import math
import time
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seer_jax.config.schema import RunConfig
from seer_jax.distributed.kv_pool import MAX_CONCURRENCY, PoolDirectory, PoolOwner, sum_stats
from seer_jax.distributed.resources import get_result
from seer_jax.kvpool import PoolStats
from seer_jax.kvpool.factory import open_embedded_pool

START_TIMEOUT_S = 60.0
STATS_TIMEOUT_S = 5.0
PING_INTERVAL_S = 5.0
DIRECTORY = "directory"
"""Stands for a node's name where the directory is watched."""


class PoolOwners:
    """The owners of one run, by node, and their directory.

    A new owner is empty, and so is a new directory until the owners have told it what they hold.

    Attributes:
        actors: Living owners by Ray's id of their node.
        directory: Knows who has what; None while there is one owner.
        watches: A call that ends when its actor dies, with the node.
    """

    def __init__(self, config: RunConfig) -> None:
        """Start an owner on every node that Ray has.

        Raises:
            ConfigError: If one cannot open its pool.
        """
        self._config = config
        self._num_replaced = self._num_lost = 0
        self._names: dict[str, str] = {}
        self._before: dict[str, PoolStats] = {}
        self.actors: dict[str, Any] = {}
        self.directory: Any = None
        self.watches: dict[Any, str] = {}
        self._pings: dict[str, tuple[float, Any, Any]] = {}
        self.refresh()
        checks = [actor.check.remote() for actor in self.actors.values()]
        ray.wait(checks, num_returns=len(checks), timeout=START_TIMEOUT_S)
        for check in checks:
            try:
                get_result(check, timeout_s=0.0)
            except RayTaskError:
                raise
            except RayError:
                continue  # Slow or dead: whoever watches finds out, and the others can begin.

    def refresh(self) -> None:
        """Start an owner on every node that is new."""
        for node in _living_nodes():
            if node not in self._names:
                self._names[node] = f"owner-{len(self._names)}"
                self._start(node)

    def replace(self, watch: Any) -> None:
        """Start another actor in place of one whose watch has ended, while there may be one and its node lives."""
        node = self.watches.pop(watch)
        is_directory = node == DIRECTORY
        left = self._config.rollout.max_replacements - self._num_replaced
        logging.warning("The KV pool's %s is lost; replacements left: %d", DIRECTORY if is_directory else "owner", left)
        if is_directory:
            self.directory = None
        else:
            self._num_lost += 1
            del self.actors[node]
            self._before.pop(node, None)
            if self.directory is not None:
                self.directory.forget.remote(node)
        if left > 0 and (is_directory or node in _living_nodes()):
            self._num_replaced += 1
            self._start_directory() if is_directory else self._start(node)

    def kill(self) -> None:
        """Let an owner die, as a fault would, if one is left; returns when that shows in `watches`."""
        if not self.actors:
            return
        node, actor = next(iter(self.actors.items()))
        ray.kill(actor)
        ray.wait([watch for watch, name in self.watches.items() if name == node], timeout=START_TIMEOUT_S)

    def kill_silent(self) -> None:
        """Kill owners and directory that leave a call unanswered for too long: a hang ends as a death."""
        now, living = time.monotonic(), {**self.actors, DIRECTORY: self.directory}
        for node, actor in living.items():
            sent, asked, call = self._pings.get(node, (-math.inf, None, None))
            if actor is None or (asked is actor and now - sent < PING_INTERVAL_S):
                continue
            is_answered = asked is not actor or bool(ray.wait([call], timeout=0)[0])
            if is_answered:
                self._pings[node] = (now, actor, actor.ping.remote())
            elif now - sent > self._config.rollout.instance_timeout_s:
                logging.warning("The KV pool's %s hangs", "directory" if node == DIRECTORY else "owner")
                ray.kill(actor)

    def start_iteration(self) -> None:
        """Count anew, replacements too."""
        self._num_lost = self._num_replaced = 0
        self._before = self._each()

    def stats(self) -> PoolStats:
        """Figures since `start_iteration`; what a dead owner had counted is lost with it."""
        before = self._before
        parts = [stats.since(before.get(node, PoolStats())) for node, stats in self._each().items()]
        return sum_stats([*parts, PoolStats(num_owners_lost=self._num_lost)])

    def close(self) -> None:
        """Stop all of it."""
        for actor in (*self.actors.values(), self.directory):
            if actor is not None:
                ray.kill(actor)
        self.actors.clear()
        self.watches.clear()

    def _each(self) -> dict[str, PoolStats]:
        calls = {node: actor.stats.remote() for node, actor in self.actors.items()}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=STATS_TIMEOUT_S)
        found = {}
        for node, call in calls.items():
            try:
                found[node] = ray.get(call, timeout=0)
            except RayTaskError:
                raise
            except RayError:
                continue  # Dead or silent: its blocks are gone, and its figures.
        return found

    def _start(self, node: str) -> None:
        make = partial(open_embedded_pool, self._config, self._names[node])
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "max_concurrency": MAX_CONCURRENCY, "scheduling_strategy": where}
        self.actors[node] = actor = ray.remote(PoolOwner).options(**options).remote(make)
        self.watches[actor.watch.remote()] = node
        if self.directory is None and len(self.actors) > 1:
            self._start_directory()

    def _start_directory(self) -> None:
        self.directory = ray.remote(PoolDirectory).options(num_cpus=0, max_concurrency=2).remote()
        self.watches[self.directory.watch.remote()] = DIRECTORY
        for node, actor in self.actors.items():
            actor.announce.remote(node, self.directory)


def _living_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]
