"""Whole models on chips that are not there: the engine's own decode step, compiled, and what it sends and holds."""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kernels_pallas.mla_attention import pad_row_width
from seer_jax.config.schema import ShardingConfig
from seer_jax.core.packing import packed_size
from seer_jax.core.step_shapes import StepShape
from seer_jax.engine.parallel import by_rank, place
from seer_jax.engine.step import make_step
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import decoder_specs
from seer_jax.sharding import make_mesh
from tests.aot import hopper, topology
from tests.models.test_config import KIMI_K2 as KIMI_K2_JSON

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
HBM = {"v5p": 95e9, "v6e": 32e9, "h200": 141e9}
"""Bytes of a chip."""
OTHER_PROGRAMS = {
    "prompts beside decoding": {"num_tiles": 16, "tile": 16},
    "verified trees": {"num_rows": 0, "num_tiles": SLOTS, "tile": 4, "max_depth": 8, "has_trees": True},
    "top-k and top-p": {"truncates": True},
}
"""What else an engine runs, as differences to plain decoding (`Deployment.program`)."""
KERNEL_CALLS = {"pallas_tpu": "tpu_custom_call", "pallas_gpu": "mosaic_gpu_v2"}
"""How a kernel is called in a lowered program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """An instance: a model on chips, with 64 slots and a pool of `pages`, each of 64 tokens, divided over `data`."""

    model: DecoderConfig
    topology: str
    """Of TPUs, such as v6e:2x4, or "h200" for as many of these as the mesh has."""
    expert: int
    tensor: int
    context: int
    pages: int
    data: int = 1
    is_float8: bool = False
    """Cache and routed experts."""
    program: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """What its step's shape has other than that of plain decoding."""

    @property
    def num_chips(self) -> int:
        return self.data * self.expert * self.tensor

    @property
    def implementation(self) -> str:
        return "pallas_gpu" if self.topology == "h200" else "pallas_tpu"

    @property
    def shape(self) -> StepShape:
        slots = SLOTS // self.data
        decode = StepShape(num_requests=slots, num_rows=slots, num_tiles=0, tile=1, num_pages=self.context // PAGE)
        return dataclasses.replace(decode, **self.program)

    def arguments(self):
        """The mesh, and the step's arguments as they lie on it: weights, caches, packed requests."""
        sizes = ShardingConfig(data=self.data, expert=self.expert, tensor=self.tensor)
        is_gpu = self.topology == "h200"
        chips = list(hopper.devices(self.num_chips).flat) if is_gpu else topology.devices(self.topology)
        mesh = make_mesh(sizes, chips)
        specs = decoder_specs(self.model, jnp.bfloat16, has_float8_experts=self.is_float8)
        weights, caches = place(self.model, specs, mesh)
        params = jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding), specs, weights
        )
        rows = (self.pages, PAGE, pad_row_width(self.model.latent_width, "gpu" if is_gpu else "tpu"))
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
            step = make_step(self.model, self.shape, max_steps=8, mesh=mesh, implementation=self.implementation)
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
    """Attention in every layer, two kernels in every MoE layer, and one that draws; arguments as counted; no logits.

    Rows and tiles attend apart. Top-k and top-p need logits: themselves, in order, and summed up.
    """
    layers, generation, shape = deployment.model.num_hidden_layers, deployment.topology.split(":")[0], deployment.shape
    moe_layers = layers - deployment.model.first_k_dense_replace
    attention = layers * ((shape.num_rows > 0) + (shape.num_tiles > 0))
    num_kernels = attention + 2 * moe_layers + (not shape.truncates)
    assert text.count(f"custom_call @{KERNEL_CALLS[deployment.implementation]}") == num_kernels
    memory, counted = compiled.memory_analysis(), deployment.count_argument_bytes()
    assert counted <= memory.argument_size_in_bytes < 1.01 * counted
    # What libtpu keeps of each layer, measured 6 MB for Kimi-K2 and 2 MB for Moonlight; of a GPU's, what kernels of one
    # layer gather, 72 MB and 31.
    expected = 80e6 if deployment.topology == "h200" else 32e6 + 8e6 * layers
    logits = shape.truncates * 3 * 4 * shape.num_requests * deployment.model.vocab_size
    assert memory.temp_size_in_bytes < expected + logits
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.9 * HBM[generation]
    # Caches are written in place.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 2**20


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
