"""Draft server and clients agree on what was said, whatever happens to the messages between them."""

import pickle
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.draft import kernels
from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.client import DraftClient
from seer_jax.core.draft.messages import FIRST_REMEMBERED, ExchangeReply, HeldGroup, TokenDelta, prompt_key
from seer_jax.core.draft.server import DraftServer, TokenLog
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestId
from tests.draft.test_client import PROMPT, draft_lines, exchange, make_client, make_sequence, say

NUM_CLIENTS, NUM_GROUPS, GROUP_SIZE, CHUNK = 3, 2, 3, 6
REQUESTS = [RequestId(g, i) for g in range(NUM_GROUPS) for i in range(GROUP_SIZE)]
ALPHABET = 3


def tokens(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int32)


def held_group(group_id: int, num_held: Mapping[int, int] | None = None, prompt: np.ndarray = PROMPT) -> HeldGroup:
    return HeldGroup(group_id=group_id, num_held=num_held or {}, prompt_key=prompt_key(prompt))


def responses_of(server: DraftServer, group_id: int) -> dict[int, list[int]]:
    """All that a server holds of a group, without the requests that said nothing."""
    return {delta.request_id.index: delta.token_ids.tolist() for delta in server.fetch_cst([held_group(group_id)])}


def counts_of(automaton: SuffixAutomaton, context: tuple[int, ...] = (), state: int = 0) -> dict[tuple[int, ...], int]:
    """Occurrences of all contexts of at most 3 tokens."""
    counts = {context: int(automaton.states[state, kernels.COUNT])} if context else {}
    for token in [*range(ALPHABET), *PROMPT.tolist()] if len(context) < 3 else []:
        target = kernels.find(automaton.states, automaton.edges, automaton.buckets, state, token)
        if target:
            counts |= counts_of(automaton, (*context, token), target)
    return counts


def build(responses: Mapping[int, list[int]]) -> SuffixAutomaton:
    """An automaton that saw all responses whole."""
    automaton = SuffixAutomaton()
    automaton.open(-1)
    automaton.append(-1, PROMPT)
    for index, said in responses.items():
        automaton.open(index, like=-1)
        automaton.append(index, tokens(*said))
    return automaton


class Network:
    """Clients, a server, requests that pause after every chunk and go on anywhere, messages that wait for delivery."""

    def __init__(self) -> None:
        self.server = DraftServer()
        self.clients = [make_client() for _ in range(NUM_CLIENTS)]
        self.truth = {request_id: [] for request_id in REQUESTS}
        self.places = {request_id: request_id.index % NUM_CLIENTS for request_id in REQUESTS}
        self.sequences = {request_id: self.start(request_id) for request_id in REQUESTS}
        self.requests: list[tuple[int, bytes]] = []
        self.replies: list[tuple[int, bytes]] = []

    def start(self, request_id: RequestId) -> Sequence:
        return make_sequence(request_id, self.truth[request_id], max_chunk=CHUNK)

    def say(self, request: int, token_ids: list[int], next_client: int) -> None:
        request_id = REQUESTS[request]
        sequence = self.sequences[request_id]
        said = token_ids[: CHUNK - sequence.num_new]
        self.truth[request_id] += said
        self.clients[self.places[request_id]].observe(say(sequence, said))
        if sequence.finish_reason == "chunk":
            self.places[request_id] = next_client
            self.sequences[request_id] = self.start(request_id)

    def send(self, client: int) -> None:
        sender = self.clients[client]
        self.requests.append((client, pickle.dumps((sender.epoch, sender.updates(), sender.held()))))

    def deliver(self, message: int) -> None:
        """Deliver a message that was not delivered before, or was: none are taken away."""
        if self.requests:
            client, request = self.requests[message % len(self.requests)]
            self.replies.append((client, pickle.dumps(self.server.exchange(*pickle.loads(request)))))

    def reply(self, message: int) -> None:
        if self.replies:
            client, reply = self.replies[message % len(self.replies)]
            self.clients[client].apply(pickle.loads(reply))

    def forget(self, client: int) -> None:
        """Let the times to live of a client's groups run out."""
        for now in (0.0, 1e9):
            self.clients[client].expire(now)

    def check_agreement(self) -> None:
        """Every client and the server know every response whole."""
        for group_id in range(NUM_GROUPS):
            truth = {r.index: said for r, said in self.truth.items() if r.group_id == group_id}
            assert responses_of(self.server, group_id) == {index: said for index, said in truth.items() if said}
            expected = counts_of(build(truth))
            for client in self.clients:
                group = client._groups.get((group_id,))
                assert group is None or counts_of(group.automaton) == expected


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("say"),
            st.integers(0, len(REQUESTS) - 1),
            st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=CHUNK),
            st.integers(0, NUM_CLIENTS - 1),
        ),
        st.tuples(st.sampled_from(["send", "forget"]), st.integers(0, NUM_CLIENTS - 1)),
        st.tuples(st.sampled_from(["deliver", "reply"]), st.integers(0, 30)),
    ),
    min_size=20,
    max_size=60,
)


@given(steps)
def test_all_agree_after_clean_exchanges_whatever_happened_to_messages(steps: list[tuple]) -> None:
    """Messages are lost, repeated and reordered; requests move; groups are forgotten, perhaps before they were sent."""
    network = Network()
    for name, *arguments in steps:
        getattr(network, name)(*arguments)
    for request in range(len(REQUESTS)):  # One more token shows the server what it lacks, and nobody has forgotten it.
        network.say(request, [0], network.places[REQUESTS[request]])
    # In the first exchange the server hears all or asks for it, in the second it gets that, in the third it tells all.
    for _ in range(3):
        for client in network.clients:
            exchange(client, network.server)
    network.check_agreement()
    for client in network.clients:
        assert client.updates() == [] and network.server.fetch_cst(client.held()) == []


@given(steps)
def test_one_clean_exchange_each_is_enough_where_nothing_moved(steps: list[tuple]) -> None:
    network = Network()
    for name, *arguments in steps:
        if name == "say":
            arguments[-1] = network.places[REQUESTS[arguments[0]]]
        if name != "forget":
            getattr(network, name)(*arguments)
    for _ in range(2):  # Once to tell, once to be told what those after had to tell.
        for client in network.clients:
            exchange(client, network.server)
    network.check_agreement()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=30))
def test_updates_are_idempotent_trimmed_and_refused_after_a_gap(slices: list[tuple[int, int]]) -> None:
    server, text, known = DraftServer(), np.arange(100, dtype=np.int32), 0
    for start, count in slices:
        held = server.update_cst(RequestId(0, 0), start, text[start : start + count])
        known = max(known, start + count) if start <= known else known
        assert held == known
    assert responses_of(server, 0).get(0, []) == text[:known].tolist()


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=12), st.integers(0, 4))
def test_deltas_are_taken_once_trimmed_and_not_after_a_gap(slices: list[tuple[int, int]], num_own: int) -> None:
    """A sibling's tokens, of which this client has seen the first itself."""
    text, known, client = tokens(0, 1, 2, 0, 0, 1, 1, 2, 2, 0, 1, 0, 2, 1, 0, 0, 0, 2), num_own, make_client()
    client.observe(make_sequence(RequestId(0, 1)))
    if num_own:
        client.observe(say(make_sequence(RequestId(0, 0), max_chunk=num_own), text[:num_own]))
    for start, count in slices:
        delta = TokenDelta(request_id=RequestId(0, 0), prev_token_count=start, token_ids=text[start : start + count])
        client.apply(ExchangeReply(epoch=0, deltas=[delta], num_held={}))
        known = max(known, start + count) if start <= known else known
        assert client.held()[0].num_held.get(0, 0) == known
    assert counts_of(client._groups[(0,)].automaton) == counts_of(build({0: text[:known].tolist()}))


def test_log_slices_on_their_way_to_a_client_do_not_change() -> None:
    log = TokenLog()
    log.append(tokens(1, 2, 3))
    sent = log.since(1)
    for _ in range(100):
        log.append(tokens(4, 5))
    assert sent.tolist() == [2, 3] and log.num_tokens == 203 and log.since(201).tolist() == [4, 5]


def test_fetch_brings_only_what_is_missing() -> None:
    server = DraftServer()
    server.update_cst(RequestId(0, 0), 0, tokens(1, 2, 3))
    server.update_cst(RequestId(0, 1), 0, tokens(4, 5))
    server.update_cst(RequestId(1, 0), 0, tokens(6))
    deltas = server.fetch_cst([held_group(0, {0: 2, 1: 2})])
    assert [(d.request_id, d.prev_token_count, d.token_ids.tolist()) for d in deltas] == [((0, 0), 2, [3])]
    assert server.fetch_cst([]) == []


def test_gap_is_reported_and_filled_from_the_count_held() -> None:
    server, client, request_id = DraftServer(), make_client(), RequestId(0, 0)
    server.update_cst(request_id, 0, tokens(1, 2))
    client.observe(say(make_sequence(request_id, [1, 2, 3, 4]), [5]))
    reply = server.exchange(0, client.updates(), client.held())
    assert client.updates()[0].prev_token_count == 4 and reply.num_held == {request_id: 2}
    client.apply(reply)
    (update,) = client.updates()
    assert update.prev_token_count == 2 and update.token_ids.tolist() == [3, 4, 5]
    exchange(client, server)
    assert client.updates() == [] and responses_of(server, 0) == {0: [1, 2, 3, 4, 5]}


def test_clients_fill_a_server_that_lost_everything() -> None:
    client, sequence = make_client(), say(make_sequence(RequestId(0, 0)), [1, 2, 3])
    client.observe(sequence)
    exchange(client, DraftServer())
    server = DraftServer()
    client.observe(say(sequence, [4]))
    for _ in range(2):
        exchange(client, server)
    assert responses_of(server, 0) == {0: [1, 2, 3, 4]}


def test_messages_of_another_epoch_are_ignored_by_both_sides() -> None:
    server, client = DraftServer(), make_client()
    client.observe(say(make_sequence(RequestId(0, 0)), [1, 2]))
    stale = client.epoch, client.updates(), client.held()
    server.update_cst(RequestId(0, 1), 0, tokens(7, 8))
    late_reply = server.exchange(*stale)

    server.start_epoch(1)
    reply = server.exchange(*stale)
    assert reply.epoch == 1 and not reply.deltas and not reply.num_held and server.num_tokens == 0

    client.clear(1)
    client.observe(say(make_sequence(RequestId(0, 0)), [3]))
    client.apply(late_reply)
    (held,), (update,) = client.held(), client.updates()
    assert list(held.num_held) == [0] and update.token_ids.tolist() == [3]


def test_groups_not_registered_are_ignored() -> None:
    server, client = DraftServer(), make_client()
    server.update_cst(RequestId(5, 0), 0, tokens(1, 2))
    client.apply(server.exchange(0, [], [held_group(5)]))
    assert client.held() == []


def run_epoch(server: DraftServer, group_id: int, prompt: np.ndarray, *said: list[int]) -> DraftClient:
    """One group says something, and the next epoch begins."""
    client = make_client(policy_version=server.epoch)
    for index, token_ids in enumerate(said):
        client.observe(say(make_sequence(RequestId(group_id, index), prompt=prompt), token_ids))
    exchange(client, server)
    server.start_epoch(server.epoch + 1)
    return client


def first_draft(server: DraftServer, prompt: np.ndarray, said: list[int]) -> list[int]:
    """What a new group's first request drafts after one exchange."""
    client, sequence = (
        make_client(policy_version=server.epoch),
        say(make_sequence(RequestId(9, 0), prompt=prompt), said),
    )
    client.observe(sequence)
    exchange(client, server)
    assert server.fetch_cst(client.held()) == []
    (draft,) = draft_lines(client, sequence)
    return draft


def test_prompt_that_comes_again_is_drafted_from_what_was_said_to_it() -> None:
    server = DraftServer(memory_tokens=100)
    run_epoch(server, 0, PROMPT, [10, 11, 12, 13], [20, 21])
    assert first_draft(server, PROMPT, [10]) == [11, 12, 13]
    assert first_draft(server, PROMPT, [20]) == [21]
    assert first_draft(server, PROMPT[::-1].copy(), [10]) == []
    deltas = server.fetch_cst([held_group(3)])
    assert sorted(d.request_id.index for d in deltas) == [FIRST_REMEMBERED - 1, FIRST_REMEMBERED]


def test_nothing_is_remembered_unless_asked_for() -> None:
    server = DraftServer()
    run_epoch(server, 0, PROMPT, [10, 11, 12, 13])
    assert server.num_remembered_tokens == 0 and first_draft(server, PROMPT, [10]) == []


def test_newest_responses_to_a_prompt_replace_older_ones() -> None:
    server = DraftServer(memory_tokens=100)
    run_epoch(server, 0, PROMPT, [10, 11], [12])
    run_epoch(server, 4, PROMPT, [10, 15, 16])
    run_epoch(server, 4, PROMPT)  # The prompt came, but nothing was said.
    assert server.num_remembered_tokens == 3 and first_draft(server, PROMPT, [10]) == [15, 16]


@pytest.mark.parametrize("limit", [1, 4, 8, 12, 100])
def test_memory_is_bounded_and_forgets_the_prompts_not_seen_for_longest(limit: int) -> None:
    server = DraftServer(memory_tokens=limit)
    prompts = [tokens(40 + i, 41 + i) for i in range(5)]
    for group_id in (0, 1, 2, 0, 3, 4):
        run_epoch(server, group_id, prompts[group_id], [group_id, 30, 31, 32])
        assert server.num_remembered_tokens <= limit
    by_age = [4, 3, 0, 2, 1]
    known = [group_id for group_id in by_age if first_draft(server, prompts[group_id], [group_id])]
    assert known == by_age[: limit // 4]


def test_memory_outlives_epochs_without_the_prompt_and_mixes_with_siblings() -> None:
    server = DraftServer(memory_tokens=100)
    run_epoch(server, 0, PROMPT, [10, 11])
    run_epoch(server, 1, PROMPT[:2].copy(), [50])
    client, sequences = make_client(policy_version=2), [make_sequence(RequestId(7, i)) for i in range(2)]
    for sequence, said in zip(sequences, ([20, 21, 10], [20]), strict=True):
        client.observe(say(sequence, said))
    exchange(client, server)
    assert draft_lines(client, *sequences) == [[11], [21, 10, 11]]


def test_messages_travel_between_processes() -> None:
    delta = TokenDelta(request_id=RequestId(0, 1), prev_token_count=2, token_ids=np.arange(9, dtype=np.int32)[3:5])
    data = pickle.dumps(delta, protocol=5)
    assert pickle.loads(data).token_ids.tolist() == [3, 4] and len(data) < 400
