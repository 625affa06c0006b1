"""The draft server as a Ray actor, and the instance's side of it: asynchronous, never between two decode steps.

Losing a server, or a reply that the client cannot take in, costs acceptance and nothing else: drafts are verified,
wherever they come from.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from seer_jax.core.draft.client import DraftClient
from seer_jax.core.draft.messages import ExchangeReply, HeldGroup, TokenDelta
from seer_jax.core.draft.server import DraftServer

EXCHANGE_TIMEOUT_S = 10.0
MAX_TOKENS_BETWEEN_STEPS = 8192
"""Tokens of siblings that are taken in between two dispatches: 2 to 4 ms."""
START_TIMEOUT_S = 60.0


class DraftServerActor:
    """A `DraftServer` in a process of its own; `DraftServers` makes it an actor."""

    def __init__(self, memory_tokens: int) -> None:
        self._server = DraftServer(memory_tokens=memory_tokens)

    def start_epoch(self, policy_version: int) -> None:
        """See `DraftServer.start_epoch`."""
        self._server.start_epoch(policy_version)

    def num_tokens(self) -> int:
        """Tokens heard in this epoch."""
        return self._server.num_tokens

    def exchange(self, epoch: int, updates: Sequence[TokenDelta], held: Sequence[HeldGroup]) -> ExchangeReply:
        """See `DraftServer.exchange`."""
        return self._server.exchange(epoch, updates, held)


class DraftServers:
    """The draft servers of a cluster, which share the groups; owned by the controller.

    Args:
        count: Servers; 0 = none.
        memory_tokens: Tokens of earlier epochs that all of them together remember.
    """

    def __init__(self, count: int, memory_tokens: int) -> None:
        self._actor_class = ray.remote(DraftServerActor).options(num_cpus=0)
        self._memory_tokens = memory_tokens // max(1, count)
        self.actors = [self._actor_class.remote(self._memory_tokens) for _ in range(count)]

    def start_epoch(self, policy_version: int) -> None:
        """Let all servers begin an epoch; replaces dead ones."""
        for index, actor in enumerate(self.actors):
            try:
                ray.get(actor.start_epoch.remote(policy_version), timeout=START_TIMEOUT_S)
            except (RayActorError, GetTimeoutError) as error:
                logging.warning("Draft server %d is lost (%s); a new one starts", index, type(error).__name__)
                ray.kill(actor)
                self.actors[index] = actor = self._actor_class.remote(self._memory_tokens)
                ray.get(actor.start_epoch.remote(policy_version), timeout=START_TIMEOUT_S)

    def close(self) -> None:
        """Stop the servers."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors.clear()


class DraftSync:
    """Keeps an instance's draft client in touch with the servers, from a thread of its own.

    Args:
        client: The client; touched only inside `run_between_steps`.
        interval_s: Seconds between two exchanges.
        run_between_steps: Lets the engine's thread make a call and returns its result.
        is_wanted: Whether anything runs whose drafts are worth it; an exchange costs milliseconds of CPU.

    Attributes:
        num_dropped: Replies that the client failed to take in. Their server is given up like a dead one, until
            `connect`, since it would send the same again.
    """

    def __init__(
        self,
        client: DraftClient,
        interval_s: float,
        run_between_steps: Callable[[Callable[[], Any]], Any],
        is_wanted: Callable[[], bool],
    ) -> None:
        self._client, self._interval_s = client, interval_s
        self._run_between_steps, self._is_wanted = run_between_steps, is_wanted
        self._servers: list[Any] = []
        self.num_dropped = 0

    def connect(self, servers: Sequence[Any]) -> None:
        """Use these servers from now on; group g belongs to server g modulo their number."""
        self._servers = list(servers)

    def serve(self) -> None:
        """Exchange for ever."""
        while True:
            time.sleep(self._interval_s)
            if self._is_wanted():
                self.exchange()

    def exchange(self) -> None:
        """One exchange with every server that is left."""
        client, servers, count = self._client, self._servers, len(self._servers)
        if not any(servers):
            return
        epoch, updates, held = self._run_between_steps(lambda: (client.epoch, client.updates(), client.held()))
        replies = {
            index: server.exchange.remote(
                epoch,
                [update for update in updates if update.request_id.group_id % count == index],
                [group for group in held if group.group_id % count == index],
            )
            for index, server in enumerate(servers)
            if server is not None
        }
        for index, ref in replies.items():
            try:
                reply = ray.get(ref, timeout=EXCHANGE_TIMEOUT_S)
            except GetTimeoutError:
                continue  # Slow, not dead: what it lacks is sent again.
            except RayError as error:
                logging.warning("Draft server %d is lost (%s); its groups draft from this instance", index, error)
                servers[index] = None  # Until `connect` names another.
                continue
            parts = split_reply(reply, MAX_TOKENS_BETWEEN_STEPS)
            if not all(self._run_between_steps(partial(self._apply, part)) for part in parts):
                self.num_dropped += 1
                servers[index] = None

    def _apply(self, part: ExchangeReply) -> bool:
        """Let the client take in a reply; False if it failed. What is raised here would end the engine's thread."""
        try:
            self._client.apply(part)
        except Exception:
            if not self.num_dropped:
                logging.exception("A reply of the draft servers is dropped; further ones are only counted")
            # Half of it may have been taken in: everything is built again from the tokens that are known here.
            self._client.clear(self._client.epoch)
            return False
        return True


def split_reply(reply: ExchangeReply, max_tokens: int) -> Iterator[ExchangeReply]:
    """Cut a reply so that no part but those of a single delta has more tokens, in order."""
    deltas: list[TokenDelta] = []
    for delta in reply.deltas:
        if deltas and sum(len(d.token_ids) for d in deltas) + len(delta.token_ids) > max_tokens:
            yield replace(reply, deltas=deltas)
            deltas = []
        deltas.append(delta)
    yield replace(reply, deltas=deltas)
