"""The engine's own decode step compiles for whole models on slices of TPUs, kernels inside, within bounded memory.

Its collectives are counted in the compiled program, so also those that the partitioner adds.
"""

import dataclasses
import math
import re
import time
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.mla_attention import pad_row_width
from seer_jax.config.schema import ShardingConfig
from seer_jax.core.packing import packed_size
from seer_jax.core.step_shapes import StepShape
from seer_jax.engine.parallel import by_rank, place
from seer_jax.engine.step import make_step
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import decoder_specs
from seer_jax.sharding import make_mesh
from tests.aot.topology import devices
from tests.models.test_config import KIMI_K2 as KIMI_K2_JSON

pytestmark = [pytest.mark.aot, pytest.mark.timeout(1800)]

KIMI_K2 = DecoderConfig.from_hf(KIMI_K2_JSON)
MOONLIGHT = dataclasses.replace(
    KIMI_K2,
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    routed_scaling_factor=2.446,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    max_position_embeddings=8192,
)
SLOTS, PAGE = 64, 64
HBM = {"v5p": 95e9, "v6e": 32e9}
"""Bytes of a chip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """An instance: a model on a slice, with 64 slots and a pool of `pages`, each of 64 tokens, divided over `data`."""

    model: DecoderConfig
    topology: str
    expert: int
    tensor: int
    context: int
    pages: int
    data: int = 1
    is_float8: bool = False
    """Cache and routed experts."""

    @property
    def num_chips(self) -> int:
        return self.data * self.expert * self.tensor

    @property
    def shape(self) -> StepShape:
        slots = SLOTS // self.data
        return StepShape(num_requests=slots, num_rows=slots, num_tiles=0, tile=1, num_pages=self.context // PAGE)

    def arguments(self):
        """The mesh, and the step's arguments as they lie on it: weights, caches, packed requests."""
        sizes = ShardingConfig(data=self.data, expert=self.expert, tensor=self.tensor)
        mesh = make_mesh(sizes, devices(self.topology))
        specs = decoder_specs(self.model, jnp.bfloat16, has_float8_experts=self.is_float8)
        weights, caches = place(self.model, specs, mesh)
        params = jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding), specs, weights
        )
        rows = (self.pages, PAGE, pad_row_width(self.model.latent_width, "tpu"))
        cache = jax.ShapeDtypeStruct(rows, jnp.float8_e4m3fn if self.is_float8 else jnp.bfloat16, sharding=caches)
        packed = jax.ShapeDtypeStruct((self.data * packed_size(self.shape),), jnp.int32, sharding=by_rank(mesh))
        return mesh, (params, [cache] * self.model.num_hidden_layers, packed)

    def count_argument_bytes(self) -> int:
        """Bytes of weights and caches on a chip, from shapes and shardings alone."""
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.arguments()[1])
        )

    def count_cache_bytes(self) -> int:
        """Bytes of the caches alone."""
        cache, *others = self.arguments()[1][1]
        return (1 + len(others)) * math.prod(cache.sharding.shard_shape(cache.shape)) * cache.dtype.itemsize

    def compile(self) -> tuple[str, jax.stages.Compiled]:
        """The lowered text and the program."""
        mesh, arguments = self.arguments()
        started = time.perf_counter()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            step = make_step(self.model, self.shape, max_steps=8, mesh=mesh, implementation="pallas_tpu")
            lowered = step.lower(*arguments)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        print(
            f"AOT step {self.topology} data {self.data} expert {self.expert} tensor {self.tensor}, "
            f"{self.model.num_hidden_layers} layers: "
            f"{time.perf_counter() - started:.0f} s, arguments {memory.argument_size_in_bytes / 1e9:.2f} GB,"
            f" temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB"
        )
        return lowered.as_text(), compiled


MOONLIGHT_STEP = Deployment(model=MOONLIGHT, topology="v6e:2x4", expert=8, tensor=1, context=8192, pages=2048)
KIMI_K2_STEP = Deployment(model=KIMI_K2, topology="v5p:4x4x4", expert=4, tensor=16, context=131_072, pages=2048)
"""131,072 tokens of KV at 78 KB each; the experts over all 64 chips, 6 a layer on each."""


def with_layers(deployment: Deployment, num_layers: int) -> Deployment:
    model = dataclasses.replace(deployment.model, num_hidden_layers=num_layers)
    return dataclasses.replace(deployment, model=model)


def count_collectives(compiled: jax.stages.Compiled) -> Counter[tuple[str, int]]:
    """Collectives of a step by kind and bytes that a chip gives; the body of the loop over steps is there once."""
    collectives = Counter()
    pattern = r" = (.*?) (all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-\w+)(-start)?\("
    for line in compiled.as_text().splitlines():
        if found := re.search(pattern, line):
            types = re.findall(r"\b(bf16|f32|s32|u32|pred)\[([\d,]*)\]", found[1])
            sizes = [
                {"bf16": 2, "pred": 1}.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
                for dtype, dims in types
            ]
            # What starts these two names the source first, then targets and words of state; of a ragged source a chip
            # gives the rows that hold a token.
            names_source = found[2] in ("collective-permute", "ragged-all-to-all")
            collectives[found[2], sizes[0] if names_source else sum(sizes)] += 1
    return collectives


def check_kernels_and_memory(deployment: Deployment, text: str, compiled: jax.stages.Compiled) -> None:
    """Attention in every layer, two kernels in every MoE layer, one that draws; arguments as counted; no logits."""
    layers, generation = deployment.model.num_hidden_layers, deployment.topology.split(":")[0]
    moe_layers = layers - deployment.model.first_k_dense_replace
    assert text.count("custom_call @tpu_custom_call") == layers + 2 * moe_layers + 1
    memory, counted = compiled.memory_analysis(), deployment.count_argument_bytes()
    assert counted <= memory.argument_size_in_bytes < 1.01 * counted
    # What the compiler keeps of each layer; measured are 6 MB for Kimi-K2, 2 MB for Moonlight.
    assert memory.temp_size_in_bytes < 32e6 + 8e6 * layers
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.9 * HBM[generation]
    # Caches are written in place.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 2**20


def test_moonlight_on_eight_v6e_chips_sends_one_sum_per_moe_layer():
    text, compiled = MOONLIGHT_STEP.compile()
    check_kernels_and_memory(MOONLIGHT_STEP, text, compiled)
    assert count_collectives(compiled) == {("all-reduce", SLOTS * 2048 * 2): 26}


def test_moonlight_with_eight_ranks_has_an_eighth_of_the_cache_on_a_chip_and_exchanges_tokens():
    """Per MoE layer the ids and weights of all tokens, and each token there and back: 8 tokens to 8 chips at most."""
    ranks = dataclasses.replace(MOONLIGHT_STEP, data=8, expert=1)
    assert 8 * ranks.count_cache_bytes() == MOONLIGHT_STEP.count_cache_bytes() == 27 * 2048 * 64 * 640 * 2
    text, compiled = ranks.compile()
    check_kernels_and_memory(ranks, text, compiled)
    assert count_collectives(compiled) == {
        ("all-gather", SLOTS * 6 * 4): 2 * 26,
        ("ragged-all-to-all", SLOTS * 2048 * 2): 2 * 26,
        ("all-reduce", 4): 2,  # Whether any rank has finished, and whether any goes on.
    }


def test_ranks_with_tensor_parallelism_inside_divide_heads_and_not_tokens():
    """Over "tensor" the sums and permutes of `expected_collectives`, each of a rank's slots; the experts as above."""
    deployment = dataclasses.replace(with_layers(MOONLIGHT_STEP, 2), data=2, expert=1, tensor=4)
    text, compiled = deployment.compile()
    check_kernels_and_memory(deployment, text, compiled)
    exchanged = {("all-gather", SLOTS * 6 * 4): 2, ("ragged-all-to-all", SLOTS * 2048 * 2): 2, ("all-reduce", 4): 2}
    exchanged["all-gather", SLOTS // 2 * 2048 * 2] = 1  # What came back, to all chips of a rank.
    sums = expected_collectives(deployment)
    sums["all-reduce", SLOTS // 2 * 2048 * 2] -= 1  # The experts'.
    assert count_collectives(compiled) == sums + Counter(exchanged)


def expected_collectives(deployment: Deployment) -> Counter[tuple[str, int]]:
    """Those of a step with tensor parallelism.

    Every layer sums what heads and dense MLP, or shared expert, say over "tensor", MoE layers what experts say over all
    chips, and so does the embedding. Since the columns of `gate_up` are all gates and then all ups, each MLP's result
    is brought into order by four permutes: one of two parts, three of one part. The draw is a sum of 16 bytes for each
    slot and part of the vocabulary.
    """
    model, slots, expected = deployment.model, deployment.shape.num_requests, Counter()
    expected["all-reduce", slots * model.hidden_size * 2] += 1
    for layer in range(model.num_hidden_layers):
        is_moe = model.is_moe_layer(layer)
        expected["all-reduce", slots * model.hidden_size * 2] += 3 if is_moe else 2
        width = model.n_shared_experts * model.moe_intermediate_size if is_moe else model.intermediate_size
        part = slots * width // deployment.tensor * 2
        expected["collective-permute", part] += 3
        expected["collective-permute", 2 * part] += 1
    expected["all-reduce", 16 * slots * deployment.tensor] += 1
    return expected


def test_three_layers_of_kimi_k2_on_64_v5p_chips_send_what_is_counted():
    deployment = with_layers(KIMI_K2_STEP, 3)
    text, compiled = deployment.compile()
    check_kernels_and_memory(deployment, text, compiled)
    assert count_collectives(compiled) == expected_collectives(deployment)


def test_kimi_k2_with_float8_experts_and_caches_has_half_of_their_bytes_and_sends_the_same():
    deployment = with_layers(KIMI_K2_STEP, 3)
    float8 = dataclasses.replace(deployment, is_float8=True)
    assert 2 * float8.count_cache_bytes() == deployment.count_cache_bytes()
    text, compiled = float8.compile()
    check_kernels_and_memory(float8, text, compiled)
    assert count_collectives(compiled) == expected_collectives(deployment)


@pytest.mark.slow
def test_all_of_kimi_k2_fits_64_v5p_chips():
    """61 layers, one after the other: two minutes of two cores."""
    text, compiled = KIMI_K2_STEP.compile()
    check_kernels_and_memory(KIMI_K2_STEP, text, compiled)
    assert count_collectives(compiled) == expected_collectives(KIMI_K2_STEP)


def test_more_than_a_chip_holds_is_refused_so_the_limit_is_enforced():
    too_large = dataclasses.replace(with_layers(MOONLIGHT_STEP, 2), pages=200_000)
    assert too_large.count_argument_bytes() > HBM["v6e"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        too_large.compile()
