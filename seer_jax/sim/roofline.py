"""How long a step of a model on an accelerator takes: bytes over bandwidth or operations over their rate.

Counted per step of one instance, whose chips work in lock-step:

- Weights outside the routed experts, of which every data-parallel rank holds a copy: a chip reads
  `ranks / chips` of them. With tensor parallelism (one rank) that is the share of each chip, with data-parallel
  attention (as many ranks as chips) all of them.
- Routed experts, spread over all chips: those that at least one token chose. Tokens choose k of E at random here, so
  N tokens leave (1 - k / E)**N of the experts alone.
- KV cache of all requests, read once whatever the number of tokens: that is why verification is cheap. MLA keeps
  576 values per layer and token (512 latent, 64 rotary), GQA 2 x KV heads x head dimension.
- Operations: 2 per parameter that a token meets, and per layer and pair of query and context 2 x heads x (576 + 512)
  for absorbed MLA (scores, values) or 4 x heads x head dimension for GQA.

Load is taken as even over the chips. Of uneven ranks the fullest counts: a caller passes the load that the instance
would have if all ranks had as much. Communication is part of `step_overhead_s`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from seer_jax.sim.hardware import Chip


@dataclass(frozen=True, kw_only=True)
class RooflineStepTimes:
    """Step times of one instance; a `core.latency.StepTimeModel`.

    Attributes:
        chip: What it runs on.
        num_chips: Chips of the instance.
        num_ranks: Data-parallel ranks, each with its own KV cache and copy of what is no expert.
        parameters: Parameters that steps multiply with; the input embedding is looked up and does not count.
        active_parameters: Those that one token meets.
        expert_share: Share of the routed experts in `parameters`; 0 for a dense model.
        num_experts: Experts of a layer; 0 for a dense model.
        experts_per_token: How many of them a token chooses.
        bytes_per_parameter: 2 for bfloat16, 1 for fp8; then weights are multiplied in fp8, attention never is.
        kv_bytes_per_token: KV cache of a token, all layers.
        attention_ops_per_pair: Operations per token and token of its context in a decode step, all layers.
        prefill_attention_ops_per_pair: The same in prefill, where MLA is not absorbed: 2 x heads x (192 + 128) a layer.
        memory_efficiency: Share of the bandwidth that is reached.
        compute_efficiency: Share of the operations per second that is reached.
        prefill_efficiency: The same for prefill, of all chips, including those that wait: with data-parallel attention
            one rank computes while the others stand still.
        step_overhead_s: Seconds that any step takes on top: launches, communication, sampling, the host.
        draft_overhead_s: Seconds that drafting and the walk add to a step that verifies.
        draft_overhead_per_token_s: Seconds per draft token on top of it.
    """

    chip: Chip
    num_chips: int
    num_ranks: int
    parameters: float
    active_parameters: float
    expert_share: float
    num_experts: int
    experts_per_token: int
    bytes_per_parameter: float
    kv_bytes_per_token: float
    attention_ops_per_pair: float
    prefill_attention_ops_per_pair: float
    memory_efficiency: float
    compute_efficiency: float
    prefill_efficiency: float
    step_overhead_s: float
    draft_overhead_s: float
    draft_overhead_per_token_s: float

    def plain_step_s(self, num_seqs: int, mean_context: float) -> float:
        """See `StepTimeModel`."""
        return self.forward_s(num_seqs, num_seqs, mean_context)

    def verify_step_s(self, num_seqs: int, num_tokens: int | np.ndarray, mean_context: float) -> float | np.ndarray:
        """See `StepTimeModel`; `verify_step_s(B, B, context)` is a plain step and `draft_overhead_s`."""
        forward_s = self.forward_s(num_seqs, num_tokens, mean_context)
        return forward_s + self.draft_overhead_s + self.draft_overhead_per_token_s * (num_tokens - num_seqs)

    def forward_s(self, num_seqs: int, num_tokens: int | np.ndarray, mean_context: float) -> float | np.ndarray:
        """One step of `num_tokens` tokens of `num_seqs` requests without what drafting costs; as `verify_step_s`."""
        dense_s, experts_s, untouched, kv_token_s, token_s, pair_s, overhead_s = self._rates
        context = num_seqs * mean_context
        memory_s = dense_s + experts_s * (1 - untouched**num_tokens) + kv_token_s * context
        compute_s = num_tokens * (token_s + pair_s * mean_context)
        if isinstance(num_tokens, np.ndarray):
            return overhead_s + np.maximum(memory_s, compute_s)
        return overhead_s + (memory_s if memory_s > compute_s else compute_s)

    def prefill_s(self, num_tokens: int, start: int = 0) -> float:
        """Prefill of tokens `start .. start + num_tokens` of a request, bound by compute; part of a step."""
        token_s, pair_s = self._prefill_rates
        pairs = num_tokens * (start + (num_tokens + 1) / 2)
        return num_tokens * token_s + pairs * pair_s

    def pass_s(self, num_tokens: int, parameters: float, kv_bytes: float) -> float:
        """One pass of a small draft model, split like the model's own dense part, without overhead.

        Args:
            num_tokens: Tokens, one of each request.
            parameters: Parameters of the draft model.
            kv_bytes: Its KV cache of all requests.
        """
        weight_bytes = parameters * self.bytes_per_parameter * self.num_ranks
        memory_s = (weight_bytes + kv_bytes) / self._bytes_per_s
        return max(memory_s, 2 * parameters * num_tokens / self._linear_ops_per_s)

    @property
    def _bytes_per_s(self) -> float:
        return self.num_chips * self.chip.memory_bytes_per_s * self.memory_efficiency

    @property
    def _peak_linear(self) -> float:
        return self.num_chips * (self.chip.fp8_flops_per_s if self.bytes_per_parameter < 2 else self.chip.flops_per_s)

    @property
    def _peak_attention(self) -> float:
        return self.num_chips * self.chip.flops_per_s

    @property
    def _linear_ops_per_s(self) -> float:
        return self._peak_linear * self.compute_efficiency

    @cached_property
    def _prefill_rates(self) -> tuple[float, float]:
        """Seconds of a token, and of a pair of query and context."""
        token_s = 2 * self.active_parameters / (self._peak_linear * self.prefill_efficiency)
        return token_s, self.prefill_attention_ops_per_pair / (self._peak_attention * self.prefill_efficiency)

    @cached_property
    def _rates(self) -> tuple[float, float, float, float, float, float, float]:
        """Seconds of: what is no expert, all experts; share a token leaves alone; KV, operations, pair of a token."""
        weight_bytes = self.parameters * self.bytes_per_parameter
        return (
            weight_bytes * (1 - self.expert_share) * self.num_ranks / self._bytes_per_s,
            weight_bytes * self.expert_share / self._bytes_per_s,
            1 - self.experts_per_token / self.num_experts if self.num_experts else 0.0,
            self.kv_bytes_per_token / self._bytes_per_s,
            2 * self.active_parameters / self._linear_ops_per_s,
            self.attention_ops_per_pair / (self._peak_attention * self.compute_efficiency),
            self.step_overhead_s,
        )
