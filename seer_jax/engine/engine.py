"""One inference engine: continuous batching over a paged latent KV cache on one mesh."""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seer_jax.config.schema import ChaosConfig, EngineConfig, SpeculationConfig
from seer_jax.config.validate import check_ranks
from seer_jax.core.batching import BatchPlanner
from seer_jax.core.draft.speculator import Proposal, Speculator
from seer_jax.core.errors import ProtocolError
from seer_jax.core.events import ChunkFinished
from seer_jax.core.packing import Run, draft_runs, plan_runs
from seer_jax.core.rank_packing import pack_ranks, pick_shape, pick_verify_shape, unpack_ranks
from seer_jax.core.sequence import NewTokens, Sequence
from seer_jax.core.step_plan import StepPlan
from seer_jax.core.step_shapes import StepBuckets, StepShape
from seer_jax.core.types import InstanceInfo, InstanceStatus, KVHandle, RequestChunk, RequestId
from seer_jax.engine.kv_blocks import BlockLayout
from seer_jax.engine.kv_transfer import HostKV, KVTransfer
from seer_jax.engine.parallel import count_ranks, name_implementation, place
from seer_jax.engine.paused_kv import PausedKV
from seer_jax.engine.step import make_step
from seer_jax.engine.step_times import StepPrograms, get_step_times
from seer_jax.kvpool import EmbeddedKVPool, KVPool
from seer_jax.models.config import DecoderConfig

NO_SPECULATION, NO_CHAOS = SpeculationConfig(), ChaosConfig()
DEFAULT_POOL_BYTES = 1 << 30
EXPIRY_INTERVAL_S = 1.0
"""How often groups that ran out of time are looked for."""
CPU_VERIFY_TILE, VERIFY_TILE = 1, 4
"""Tokens that attend together in verification. On a CPU a token more costs more than reading a context again."""


class Engine:
    """Runs chunks; not thread-safe.

    Invariants: every chunk, KV block and sample carries the policy version of the weights; mixing versions raises.
    """

    def __init__(
        self,
        model_config: DecoderConfig,
        params: Mapping[str, Any],
        config: EngineConfig,
        *,
        speculation: SpeculationConfig = NO_SPECULATION,
        instance_id: int = 0,
        policy_version: int = 0,
        mesh: Mesh | None = None,
        kv_pool: KVPool | None = None,
        always_moves_kv: bool = True,
        chaos: ChaosConfig = NO_CHAOS,
    ) -> None:
        """Place the weights and allocate the caches.

        Args:
            model_config: Shapes of the model.
            params: Weights, on host or device, in the type that computes, and is cached if `kv_dtype` is auto.
            config: Slots, pages, buckets.
            speculation: Whether and how to draft tokens.
            instance_id: Name of this instance in events.
            policy_version: Version of `params`.
            mesh: Devices of this instance; None = the default device. Ranks along "data" share slots and pages.
            kv_pool: Where the KV of paused requests goes; None = memory of this process. Closed by `close`.
            always_moves_kv: Bring KV back from there even where computing it again is measured to be faster.
            chaos: Faults.

        Raises:
            ConfigError: If the model does not divide over the mesh, or has no experts whose ids could be returned; if
                slots or pages do not divide over its ranks; if the kernels do not run on these devices.
            CapacityError: If one request can never fit in the pages of a rank.
        """
        self.model_config, self.config = model_config, config
        self._implementation = name_implementation(
            config.kernels, jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        )
        num_ranks = count_ranks(mesh)
        if num_ranks > 1:
            check_ranks(config, num_ranks)
        self.info = InstanceInfo(
            instance_id=instance_id,
            num_total_pages=config.num_pages - num_ranks,
            page_size=config.page_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
        )
        verify_tile = CPU_VERIFY_TILE if jax.default_backend() == "cpu" else VERIFY_TILE
        expert_ids = model_config.expert_ids_shape if config.expert_ids else None
        self.buckets = StepBuckets(config, speculation, speculation.verify_tile or verify_tile, expert_ids, num_ranks)
        self.speculator = None if speculation.mode == "off" else Speculator(speculation, self.buckets.verify_tile)
        self._planner = BatchPlanner(
            self.info,
            max_prefill_tokens=self.buckets.max_prefill_tokens,
            prefill_tile=self.buckets.tile,
            max_steps_per_dispatch=config.max_steps_per_dispatch,
            num_ranks=num_ranks,
        )
        self._mesh = None if mesh is None or mesh.size == 1 else mesh
        self._param_shardings, cache_sharding = place(model_config, params, mesh)
        self._transfer = KVTransfer(self.buckets.max_pages, self._mesh)
        self.policy_version = policy_version
        self.params = self._place(params)
        layout = BlockLayout.of(model_config, config, params)
        num_layers, *page_shape = layout.page_shape
        cache_shape = (config.num_pages, *page_shape)
        self._caches = [jnp.zeros(cache_shape, layout.dtype, device=cache_sharding) for _ in range(num_layers)]
        pool = EmbeddedKVPool(DEFAULT_POOL_BYTES) if kv_pool is None else kv_pool
        self._paused_kv = PausedKV(self._planner, self._transfer, pool, layout, chaos, always_moves=always_moves_kv)
        self._next_expiry = 0.0
        self._reset_measurements()

    def submit(self, chunk: RequestChunk) -> None:
        """Queue a chunk. The `ref` of its KV handle is a `HostKV`, this instance's id, or None if KV could not be had.

        Raises:
            ProtocolError: If the chunk is meant for other weights.
        """
        if chunk.policy_version != self.policy_version:
            raise ProtocolError(
                f"chunk of {chunk.request_id} wants policy version {chunk.policy_version}, "
                f"the instance has {self.policy_version}"
            )
        self._planner.add(chunk)
        self._paused_kv.arrive(chunk)

    def begin_take_kv(self, request_id: RequestId) -> Callable[[], HostKV | None]:
        """Give up the KV of a request that paused here and goes on at another instance; see `PausedKV.begin_take`."""
        return self._paused_kv.begin_take(request_id, self._caches, self.policy_version)

    def take_kv(self, request_id: RequestId) -> HostKV | None:
        """`begin_take_kv`, and wait."""
        return self.begin_take_kv(request_id)()

    @property
    def has_work(self) -> bool:
        """Whether any chunk runs or waits."""
        return bool(self._planner.running or self._planner.waiting)

    @property
    def num_queued(self) -> int:
        """Chunks that wait for a slot or for pages."""
        return len(self._planner.waiting)

    @property
    def wants_drafts(self) -> bool:
        """Whether anything runs that could gain from what siblings say elsewhere."""
        num_running = len(self._planner.running)
        return self.speculator is not None and num_running > 0 and not self.speculator.is_in_vain(num_running)

    def step(self) -> list[ChunkFinished]:
        """Run one dispatch: admit, plan, launch, book. Returns the chunks that ended."""
        started = time.perf_counter()
        admitted = self._planner.admit()
        self._paused_kv.save_evicted(self._caches, self.policy_version)
        for sequence in admitted:
            self._caches = self._paused_kv.bring(sequence, self._caches, self.policy_version)
        plan = self._planner.plan()
        if plan is None:
            return []
        self._paused_kv.save_evicted(self._caches, self.policy_version)
        if plan.copies:
            self._caches = self._transfer.copy_pages(self._caches, plan.copies)
        device_time_s, decoding = self._device_time_s, time.perf_counter()
        proposal = self._propose(plan)
        if proposal is not None:
            emitted = self._verify(proposal, decoding)
        else:
            num_steps = self._num_steps
            emitted = self._decode(plan)
            seconds = time.perf_counter() - decoding
            if plan.prefills:
                self._paused_kv.costs.prefill.note(plan.num_prefilled, seconds)
            elif self.speculator is not None:
                self.speculator.note_plain_steps(plan.decodes, self._num_steps - num_steps, seconds)
        finished = [self._finish(sequence) for sequence in self._planner.commit(plan, emitted)]
        self._num_dispatches += 1
        self._host_time_s += time.perf_counter() - started - (self._device_time_s - device_time_s)
        return finished

    def _propose(self, plan: StepPlan) -> Proposal | None:
        """Draft for all sequences of a pure decode step; None if it does not pay or there is nothing to draft from."""
        if self.speculator is None or plan.prefills:
            return None
        started = time.perf_counter()
        if started > self._next_expiry:
            self.speculator.client.expire(started)
            self._next_expiry = started + EXPIRY_INTERVAL_S
        proposal = self.speculator.propose(plan.decodes, self.info.page_size, self.buckets.max_verify_tokens)
        self._draft_time_s += time.perf_counter() - started
        return proposal

    def _decode(self, plan: StepPlan) -> dict[Sequence, NewTokens]:
        """Run a plan without drafts: prefill slices and one step, or several decode steps."""
        rows, slices = plan_runs(plan)
        most = None if self.speculator is None else self.speculator.max_plain_steps(len(plan.decodes))
        num_steps = plan.num_steps if most is None else min(plan.num_steps, most)
        shape = pick_shape(self.buckets, rows, slices)
        if not shape.num_tiles:  # In the deterministic mode prompt tokens are rows too.
            rows, slices = [*rows, *slices], []
        return self._launch(rows, slices, shape, num_steps)

    def _verify(self, proposal: Proposal, started: float) -> dict[Sequence, NewTokens]:
        """Verify drafts, made from `started` on, in one step; emits what plain decoding would say."""
        runs = draft_runs(proposal.sequences, proposal.batch, proposal.num_nodes)
        shape = pick_verify_shape(self.buckets, runs)
        device_time_s = self._device_time_s
        emitted = self._launch([], runs, shape, 1) if shape.num_tiles else self._launch(runs, [], shape, 1)
        self._verify_time_s += self._device_time_s - device_time_s
        said = [emitted[sequence].token_ids for sequence in proposal.sequences]
        self.speculator.learn(proposal, said, time.perf_counter() - started)
        self._num_drafted_tokens += int(proposal.num_nodes.sum())
        self._num_accepted_tokens += sum(map(len, said)) - len(runs)
        self._num_verified += len(runs)
        return emitted

    def close(self) -> None:
        """Give the pool's memory and files back; the engine is of no use afterwards."""
        self._paused_kv.close()

    def status(self) -> InstanceStatus:
        """Telemetry since `start_iteration`."""
        busy_s = self._device_time_s + self._host_time_s
        return self._planner.status(
            step_time_s=busy_s / max(1, self._num_steps),
            num_steps=self._num_steps,
            num_dispatches=self._num_dispatches,
            host_time_s=self._host_time_s,
            device_time_s=self._device_time_s,
            draft_time_s=self._draft_time_s,
            verify_time_s=self._verify_time_s,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_verified=self._num_verified,
            policy_version=self.policy_version,
            **self._paused_kv.figures(),
        )

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None = None) -> None:
        """Begin an iteration with fresh counters and, unless None, new weights.

        Raises:
            ProtocolError: If chunks are still running: the rollout is strictly synchronous.
        """
        if self.has_work:
            raise ProtocolError("weights update while chunks run")
        if params is not None:
            self.params = self._place(params)
        self.policy_version = policy_version
        self._planner.start_iteration()
        self._paused_kv.clear(policy_version)
        if self.speculator is not None:
            self.speculator.client.clear(policy_version)
        self._reset_measurements()

    def warmup(self, *, num_peers: int = 1, truncates: bool = False) -> int:
        """Compile every program before the clock starts; returns how many there are.

        Args:
            num_peers: Instances that warm up at the same time, this one included.
            truncates: Whether requests will use top-k or top-p; programs for the other kind compile when first needed.
        """
        shapes = self.buckets.all_shapes(truncates)
        # Instances that share a compilation cache start at different programs and find the others' results.
        first = self.info.instance_id * len(shapes) // max(1, num_peers)
        for shape in shapes[first:] + shapes[:first]:
            self._launch([], [], shape, 0)
        self._caches = self._transfer.warmup(self._caches)
        if self.speculator is not None:
            self.speculator.warmup()
            if self.speculator.config.budget != "fixed":
                self.speculator.use_times(
                    get_step_times(self.programs(truncates=truncates), self.speculator.config.profile)
                )
        self._reset_measurements()
        return len(shapes)

    def programs(self, *, truncates: bool) -> StepPrograms:
        """The programs for requests that truncate, or do not, to be timed."""
        settings = self.config.kernels, self.config.kv_dtype
        return StepPrograms(
            launch=self.launch,
            buckets=self.buckets,
            truncates=truncates,
            max_model_len=self.info.max_model_len,
            page_size=self.info.page_size,
            max_steps=self.config.max_steps_per_dispatch,
            facts=(self.model_config, self.params["embed"].dtype, *settings, len(self._caches[0].devices())),
        )

    def launch(self, shape: StepShape, packed: np.ndarray) -> np.ndarray:
        """Run a program on packed inputs (`core.packing`); returns its output on the host."""
        max_steps = self.config.max_steps_per_dispatch
        named = self._implementation
        step = make_step(self.model_config, shape, max_steps=max_steps, mesh=self._mesh, implementation=named)
        launched = time.perf_counter()
        self._caches, outputs = step(self.params, self._caches, packed)
        outputs = np.asarray(outputs)
        self._device_time_s += time.perf_counter() - launched
        return outputs

    def _launch(
        self, rows: SequenceOf[Run], tiles: SequenceOf[Run], shape: StepShape, num_steps: int
    ) -> dict[Sequence, NewTokens]:
        outputs = self.launch(shape, pack_ranks(rows, tiles, shape, num_steps, self.buckets))
        steps, emitted = unpack_ranks(outputs, rows, tiles, shape, self.buckets)
        self._num_steps += steps
        return emitted

    def _reset_measurements(self) -> None:
        self._num_steps = self._num_dispatches = 0
        self._num_drafted_tokens = self._num_accepted_tokens = self._num_verified = 0
        self._host_time_s = self._device_time_s = self._draft_time_s = self._verify_time_s = 0.0

    def _place(self, params: Mapping[str, Any]) -> Any:
        return jax.device_put(params, self._param_shardings)

    def _finish(self, sequence: Sequence) -> ChunkFinished:
        chunk, reason = sequence.chunk, sequence.finish_reason
        handle = None
        if self.speculator is not None:
            self.speculator.client.observe(sequence)
        if reason == "chunk":
            handle = KVHandle(
                num_tokens=sequence.num_computed, policy_version=self.policy_version, ref=self.info.instance_id
            )
            self._planner.park(sequence)
            self._paused_kv.keep(chunk.request_id, self._caches, self.policy_version)
        else:
            self._planner.release(sequence)
            self._paused_kv.drop(chunk.request_id)
        return ChunkFinished(
            instance_id=self.info.instance_id,
            request_id=chunk.request_id,
            chunk_index=chunk.chunk_index,
            token_ids=sequence.token_ids[len(chunk.token_ids) : sequence.num_tokens],
            logprobs=sequence.logprobs[: sequence.num_new],
            expert_ids=None if sequence.expert_ids is None else sequence.expert_ids[: sequence.num_new],
            finish_reason=reason,
            policy_version=self.policy_version,
            kv=handle,
        )
