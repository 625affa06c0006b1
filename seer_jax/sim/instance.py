"""A simulated instance: continuous batching in closed form between two changes of its batch.

It admits, queues, grows and preempts as `core.batching.BatchPlanner` does, but by counts of tokens, and it advances
many steps at once: while the batch stays the same every request gains its rate a step, and a step's time grows evenly
with the context, so the time of k steps is a quadratic. Fractions of steps and tokens are kept in between.
"""

import bisect
import math
from collections.abc import Callable

import numpy as np

from seer_jax.core.errors import ConfigError
from seer_jax.core.events import ChunkFinished
from seer_jax.core.types import InstanceInfo, RequestChunk
from seer_jax.sim.batch import InstanceTimes, Segment, SimChunk, SimCounters
from seer_jax.sim.drafting import DraftingBatch, SpeculationModel, Verification
from seer_jax.sim.rows import (
    CONTEXT,
    GROUP,
    INDEX,
    LEFT,
    NOISE,
    PROBE,
    PROMPT,
    RANK,
    RATE,
    READY,
    RESERVED,
    RunningRows,
)

MAX_STEPS = 2048.0
"""Steps advanced at once with speculation on: siblings get on meanwhile, and acceptance with them."""
FRESH_STEPS, FRESH_SHARE = 64, 0.1
"""For so many steps, and changes of the batch up to such a share, drafts are not chosen anew: chunks have thousands."""
SPARE_SHARE = 0.01
"""Pages that growing chunks leave free at admission, as in `core.batching`."""
EPSILON = 1e-6
"""Tokens; less than that is left of a chunk: it is at its end."""


class SimInstance:
    """One model replica with `num_ranks` data-parallel ranks, each with a KV cache of its own, stepping together.

    Invariants: `now` never goes back; a request runs or waits, never both; no rank holds more tokens than it has room
    for; chunks with reserved pages are never preempted.

    Attributes:
        now: Simulated seconds.
        next_event_s: When something happens if nothing is sent before; infinity when idle.
        counters: See `SimCounters`.
    """

    def __init__(
        self,
        info: InstanceInfo,
        times: InstanceTimes,
        true_length: Callable[[RequestChunk], int],
        *,
        num_ranks: int = 1,
        kv_bytes_per_token: float = 0.0,
        transfer_bytes_per_s: float = math.inf,
        transfer_latency_s: float = 0.0,
        speculation: SpeculationModel | None = None,
        progress: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
        on_change: Callable[[float, int, int, float], None] | None = None,
        on_end: Callable[[int, SimChunk, float], None] | None = None,
    ) -> None:
        """Start empty at time 0.

        Args:
            info: Capacity of all ranks together.
            times: Step times of the whole instance.
            true_length: Tokens that the request of a chunk will have generated in the end.
            num_ranks: Data-parallel ranks.
            kv_bytes_per_token: Of a token's KV, for transfers.
            transfer_bytes_per_s: Of KV that comes from another instance.
            transfer_latency_s: Of each such transfer.
            speculation: How drafts are chosen; None: plain decoding.
            progress: float64 [groups, size]; written with the tokens generated.
            rng: Luck of the drafts; needed with speculation.
            on_change: Called with (time, instance, running requests, share of KV in use) after each change.
            on_end: Called with (instance, chunk, time) when a chunk ends or is preempted.

        Raises:
            ConfigError: If a request of the greatest length does not fit in one rank.
        """
        self.info, self.now, self.next_event_s = info, 0.0, math.inf
        self._finished: list[ChunkFinished] = []
        self.counters = SimCounters()
        self._times, self._true_length, self._speculation = times, true_length, speculation
        self._num_ranks, self._progress, self._rng = num_ranks, progress, rng
        self._rank_tokens = info.num_total_pages // num_ranks * info.page_size
        self._transfer = kv_bytes_per_token / transfer_bytes_per_s, transfer_latency_s
        self._on_change, self._on_end = on_change, on_end
        self._rows = RunningRows(capacity=info.max_num_seqs, num_ranks=num_ranks, page_size=info.page_size)
        self._running: list[SimChunk] = []
        self._waiting: list[SimChunk] = []
        self._num_arrived = 0
        self._stall_s = 0.0
        self._active = np.zeros(0, bool)  # Rows that decode.
        self._segment = Segment()
        self._ends_segment = False
        self._verification: Verification | None = None
        self._planned = (-math.inf, 0, 1.0)  # Steps so far, requests and tokens a request when drafts were chosen.
        if self._rank_tokens < info.max_model_len:
            raise ConfigError(
                "kv_bytes_per_rank",
                f"holds {self._rank_tokens} tokens, a request has up to {info.max_model_len}",
                "give the instance more chips, or lower lengths.limit",
            )

    def start(self, chunk: RequestChunk) -> None:
        """Take a chunk, at `now`; `plan` admits it."""
        length, num_tokens = self._true_length(chunk), len(chunk.token_ids)
        generated = num_tokens - chunk.num_prompt_tokens
        ready_s, missing = self.now, num_tokens - 1
        if chunk.kv is not None:
            missing = num_tokens - 1 - chunk.kv.num_tokens
            if chunk.kv.ref != self.info.instance_id:
                self.counters.num_imported_tokens += chunk.kv.num_tokens
                ready_s += self._transfer[1] + chunk.kv.num_tokens * self._transfer[0]
        if chunk.chunk_index:
            self.counters.num_reprefilled_tokens += missing
        self._num_arrived += 1
        waiting = SimChunk(
            chunk=chunk,
            order=(chunk.priority, self._num_arrived),
            num_new=min(chunk.max_chunk_tokens, length - generated),
            context=float(num_tokens),
            ready_s=ready_s,
            num_to_prefill=missing,
        )
        bisect.insort(self._waiting, waiting, key=lambda item: item.order)

    def advance(self, now: float) -> None:
        """Let time pass until `now`, at most `next_event_s`; `collect` gives the chunks that ended."""
        elapsed, self.now = max(0.0, now - self.now), now
        if self._running:
            self.counters.busy_s += elapsed
        stalled = min(self._stall_s, elapsed)
        self._stall_s -= stalled
        if now >= self.next_event_s and self._ends_segment:
            self._step(self._segment.steps)  # All of them, however time was rounded.
            self._finish_chunks()
        elif self._segment.steps and elapsed > stalled:
            self._step(self._segment.steps_in(elapsed - stalled))

    def collect(self) -> list[ChunkFinished]:
        """The chunks that ended since the last call, in the order in which they were admitted."""
        finished, self._finished = self._finished, []
        return finished

    def plan(self) -> None:
        """Admit, preempt and lay out the next segment; to be called after anything was sent or has ended."""
        self._admit()
        while (youngest := self._overflowing()) is not None:
            self._preempt(youngest)
        self._plan_segment()
        used = float(self._rows.used().sum())
        self.counters.max_kv_tokens = max(self.counters.max_kv_tokens, used)
        if self._on_change is not None:
            share = used / (self._rank_tokens * self._num_ranks)
            self._on_change(self.now, self.info.instance_id, len(self._running), share)

    def unfinished(self) -> list[tuple[RequestChunk, int]]:
        """The chunks that wait or run, and the tokens that each has generated so far."""
        done = {id(item): context for item, context in zip(self._running, self._rows[CONTEXT], strict=True)}
        items = [*self._running, *self._waiting]
        return [(item.chunk, int(done.get(id(item), item.context)) - len(item.chunk.token_ids)) for item in items]

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.info.max_num_seqs:
            item = self._waiting[0]
            reserved = item.chunk.num_reserved_pages * self.info.page_size
            free = self._rank_tokens - self._rows.used()
            shared = float(item.chunk.num_shared_pages * self.info.page_size)
            if shared:
                group = item.chunk.request_id.group_id
                free += [self._rows.num_shared(rank, group, shared) for rank in range(self._num_ranks)]
            rank = int(free.argmax())
            is_empty = free[rank] >= self._rank_tokens
            spare = 0.0 if reserved or is_empty else self.info.page_size + SPARE_SHARE * self._rank_tokens
            if (reserved or item.context + self.info.page_size) + spare > free[rank] and not is_empty:
                break
            del self._waiting[0]
            self._run(item, rank, reserved)

    def _run(self, item: SimChunk, rank: int, reserved: int) -> None:
        request_id = item.chunk.request_id
        left = len(item.chunk.token_ids) + item.num_new - item.context
        if item.started_s < 0:
            item.started_s = self.now
        if item.num_to_prefill:
            self.counters.num_prefilled_tokens += item.num_to_prefill
            self._stall_s += self._times.prefill_s(
                item.num_to_prefill, max(0, int(item.context) - 1 - item.num_to_prefill)
            )
            item.num_to_prefill = 0
        luck = float(self._rng.standard_normal()) if self._rng is not None else 0.0
        is_probe = float(item.chunk.priority == 0)
        row = (
            item.context,
            left,
            0.0,
            luck,
            rank,
            reserved,
            item.chunk.num_shared_pages * self.info.page_size,
            item.ready_s,
            *request_id,
            is_probe,
            item.chunk.num_prompt_tokens,
        )
        self._rows.add(row)
        self._running.append(item)

    def _overflowing(self) -> int | None:
        """The youngest growing request of a rank that cannot take another step; None if all can."""
        rows = self._rows
        if not rows.num_growing:
            return None
        for rank in np.flatnonzero(rows.used() + rows.growth() > self._rank_tokens):
            members = np.flatnonzero((rows[RESERVED] == 0) & (rows[RANK] == rank))
            if len(members) > 1:
                return int(max(members, key=lambda row: self._running[row].order))
        return None

    def _preempt(self, row: int) -> None:
        item = self._running[row]
        item.context = float(self._rows[CONTEXT][row])
        item.num_to_prefill = int(item.context) - 1
        item.ready_s = self.now
        self.counters.num_preemptions += 1
        self.counters.num_reprefilled_tokens += item.num_to_prefill
        if self._on_end is not None:
            self._on_end(self.info.instance_id, item, self.now)
        item.started_s = -1.0
        self._drop(row)
        bisect.insort(self._waiting, item, key=lambda item: item.order)

    def _drop(self, row: int) -> None:
        self._rows.drop(row)
        del self._running[row]

    def _plan_segment(self) -> None:
        rows = self._rows
        self._active = rows[READY] <= self.now
        self._segment, self._ends_segment = Segment(), False
        pending = rows[READY][~self._active]
        self.next_event_s = float(pending.min()) if len(pending) else math.inf
        if not self._active.any():
            return
        num_seqs, context = self._fullest()
        self._plan_rates(num_seqs, context)
        rates = rows[RATE][self._active]
        steps = max(float((rows[LEFT][self._active] / rates).min()), EPSILON / 2)  # It may be at its end by rounding.
        if rows.num_growing:
            room = self._rank_tokens - rows.used()
            # The last request of a rank always has room: it fits alone.
            steps = min([steps, *(float(r / g) for r, g in zip(room, rows.growth(), strict=True) if g and r > g)])
        if self._verification is not None:
            steps = min(steps, MAX_STEPS)
        first_s = self._time(num_seqs, context)
        last_s = self._time(num_seqs, context + steps * float(rates.sum()) / len(rates))
        self._segment = Segment(steps=steps, step_s=first_s, growth_s=(last_s - first_s) / steps)
        end_s = self.now + self._stall_s + self._segment.duration_s
        if end_s <= self.next_event_s:
            self.next_event_s, self._ends_segment = end_s, True

    def _fullest(self) -> tuple[int, float]:
        """Requests and mean context as if every rank were the fullest one: all wait for it."""
        contexts = self._rows[CONTEXT][self._active]
        if self._num_ranks == 1:
            return len(contexts), float(contexts.sum()) / len(contexts)
        ranks = self._rows[RANK][self._active].astype(np.int64)
        num_seqs = int(np.bincount(ranks).max()) * self._num_ranks
        return num_seqs, float(np.bincount(ranks, contexts).max()) * self._num_ranks / num_seqs

    def _plan_rates(self, num_seqs: int, context: float) -> None:
        """Choose drafts, or keep those of a few steps ago: a new request then goes as fast as the others' mean."""
        rows = self._rows
        if self._speculation is None:
            rows[RATE][:] = 1.0
            return
        since_steps, planned_seqs = self.counters.num_steps - self._planned[0], self._planned[1]
        if since_steps < FRESH_STEPS and abs(num_seqs - planned_seqs) <= FRESH_SHARE * planned_seqs:
            is_new = rows[RATE] == 0
            if is_new.any():
                rows[RATE][is_new] = rows[RATE].sum() / max(1, len(is_new) - is_new.sum()) or 1.0
            if self._verification is not None:
                num_tokens = round(self._planned[2] * num_seqs)
                self._verification = self._verification._replace(num_tokens=num_tokens)
            return
        active = rows.where(self._active)
        batch = DraftingBatch(
            groups=active[GROUP].astype(np.int64),
            generated=active[CONTEXT] - active[PROMPT],
            is_probe=active[PROBE] > 0,
            num_seqs=num_seqs,
            mean_context=context,
        )
        self._verification = self._speculation.plan(batch)
        rows[RATE][:] = self._active  # Those whose KV is under way get a rate when it has come.
        num_tokens = num_seqs
        if self._verification is not None:
            rates, variances, num_tokens = self._verification
            # The mean of a chunk's steps is off by its luck: normal, with the standard error of the mean.
            steps = np.maximum(active[LEFT] / rates, 1.0)
            rows[RATE][self._active] = np.maximum(rates + active[NOISE] * np.sqrt(variances / steps), 0.5)
        self._planned = (self.counters.num_steps, num_seqs, num_tokens / num_seqs)

    def _time(self, num_seqs: int, context: float) -> float:
        if self._verification is None or self._speculation is None:
            return self._times.plain_step_s(num_seqs, context)
        return self._speculation.step_s(num_seqs, self._verification.num_tokens, context)

    def _step(self, steps: float) -> None:
        rows, counters = self._rows, self.counters
        gained = steps * rows[RATE] * self._active
        rows[CONTEXT][:] += gained
        rows[LEFT][:] -= gained
        self._segment.take(steps)
        counters.num_steps += steps
        num_active = int(self._active.sum())
        counters.num_request_steps += steps * num_active
        counters.num_emitted_tokens += float(gained.sum())
        if self._progress is not None:
            self._progress[rows[GROUP].astype(np.int64), rows[INDEX].astype(np.int64)] += gained

    def _finish_chunks(self) -> None:
        gone = np.flatnonzero(self._rows[LEFT] < EPSILON).tolist()
        if not gone:
            return
        for row in gone:
            item = self._running[row]
            self._finished.append(item.result(self.info.instance_id, self._true_length(item.chunk)))
            if self._on_end is not None:
                self._on_end(self.info.instance_id, item, self.now)
        for row in gone[::-1]:
            self._drop(row)
        self._segment, self._ends_segment = Segment(), False  # Of a batch that is no more; `plan` lays out the next.
