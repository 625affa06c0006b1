"""The workloads that ship, and what is said about broken ones."""

import pickle

import numpy as np
import pytest
import yaml

from seer_jax.config.presets import find_preset, list_presets
from seer_jax.core.errors import ConfigError
from seer_jax.sim.hardware import CHIPS
from seer_jax.sim.lengths import sample_lengths
from seer_jax.sim.workloads import load_workload

NAMES = ("moonlight", "qwen2_vl_72b", "kimi_k2")


def broken(tmp_path, change) -> str:
    """The file of Moonlight after a change of its values."""
    values = yaml.safe_load(find_preset("moonlight", workloads=True).read_text())
    change(values)
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_all_that_ship_are_tested():
    assert {f"sim/{name}" for name in NAMES} == set(list_presets(workloads=True))
    assert not set(list_presets()) & set(list_presets(workloads=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_says_where_it_is_from(name):
    workload = load_workload(name)
    assert workload.name == name
    assert all(constant.kind in ("physical", "measured", "fitted") for constant in workload.constants.values())
    assert all(len(constant.source) > 3 for constant in workload.constants.values())
    assert workload.constants["times.step_overhead_s"].kind == "fitted"


@pytest.mark.parametrize(
    ("name", "gpus", "capacity", "weights_gb", "kv_bytes"),
    [
        # (80 x 0.9 - 32) GB / 31,104 = 1.29 M tokens; 100 requests of 22,386 would need 2.2 M.
        ("moonlight", 32, 1.29e6, 31.2, 31_104),
        # (8 x 80 x 0.9 - 146) GB / 327,680 = 1.31 M tokens; 600 requests of 7,615 would need 4.6 M.
        ("qwen2_vl_72b", 128, 1.31e6, 143, 327_680),
        # (80 x 0.9 - 31.7 - 11.7) GB / 70,272 = 0.41 M tokens a rank; 25 requests of 38,959 would need 0.97 M.
        ("kimi_k2", 256, 0.407e6, 1025, 70_272),
    ],
)
def test_the_sizes_are_the_papers(name, gpus, capacity, weights_gb, kv_bytes):
    workload, model = load_workload(name), load_workload(name).times
    assert workload.num_instances * workload.chips_per_instance == gpus
    assert workload.kv_bytes_per_token == kv_bytes
    # Fitted: training state takes a part.
    assert 0.3 * capacity < workload.kv_tokens_per_rank < 1.01 * capacity
    assert workload.kv_tokens_per_rank % workload.page_size == 0
    assert model.parameters * model.bytes_per_parameter / 1e9 == pytest.approx(weights_gb, rel=0.01)
    assert workload.num_requests % workload.group_size == 0
    # Weights and KV cache together fit in nine tenths of the memory.
    dense = model.parameters * model.bytes_per_parameter * (1 - model.expert_share)
    experts = model.parameters * model.bytes_per_parameter * model.expert_share
    ranks = workload.ranks_per_instance
    used = ranks * (dense + workload.kv_bytes_per_rank) + experts
    assert used <= 0.91 * CHIPS[workload.chip].memory_bytes * workload.chips_per_instance
    # A request at the limit fits, or nothing could run.
    assert workload.lengths.limit + workload.prompt_tokens <= workload.kv_tokens_per_rank


@pytest.mark.parametrize("name", NAMES)
def test_active_parameters_are_the_dense_part_and_the_chosen_experts(name):
    model = load_workload(name).times
    share = model.experts_per_token / model.num_experts if model.num_experts else 0
    counted = model.parameters * (1 - model.expert_share + model.expert_share * share)
    assert model.active_parameters == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_full_instance_takes_tens_of_milliseconds(name):
    workload = load_workload(name)
    context = workload.lengths.mean / 2
    num_seqs = min(workload.max_num_seqs, int(workload.kv_tokens_per_rank / context) * workload.ranks_per_instance)
    assert 0.02 < workload.times.plain_step_s(num_seqs, context) < 0.2
    assert workload.times.verify_step_s(num_seqs, num_seqs, context) > workload.times.plain_step_s(num_seqs, context)
    assert workload.speculation.vanilla.step_s(workload.times, num_seqs, context) > workload.times.plain_step_s(
        num_seqs, context
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_lengths_are_the_papers(name):
    workload = load_workload(name)
    rng = np.random.default_rng(0)
    means = [sample_lengths(workload.lengths, workload.num_groups, workload.group_size, rng).mean() for _ in range(50)]
    assert np.mean(means) == pytest.approx(workload.lengths.mean, rel=0.02)


def test_acceptance_is_table_2_of_the_paper():
    qwen, k2 = load_workload("qwen2_vl_72b").speculation, load_workload("kimi_k2").speculation
    assert [qwen.acceptance_length(number) for number in (0, 1, 3, 5, 15, 99)] == pytest.approx(
        [1.70, 2.04, 2.18, 2.32, 2.53, 2.53]
    )
    assert k2.acceptance_length(5) == pytest.approx(1 + 0.67 * 1.32)
    for number in (0, 4, 40):
        beta = qwen.acceptance_probability(number)
        assert sum(beta**position for position in range(9)) == pytest.approx(qwen.acceptance_length(number))


def test_what_the_baseline_pays_for_drafts():
    # Three passes of 7.07e9 x 2 bytes and of KV cache, spread over 8 chips, an overhead on top of each.
    workload = load_workload("qwen2_vl_72b")
    times, vanilla = workload.times, workload.speculation.vanilla
    passes = 3 * (vanilla.pass_overhead_s + (14.14e9 + 10 * 1000 * 57_344) / (8 * 3.35e12 * times.memory_efficiency))
    expected = times.verify_step_s(10, 40, 1000.0) - times.draft_overhead_s - 30 * times.draft_overhead_per_token_s
    assert vanilla.step_s(times, 10, 1000.0) == pytest.approx(expected + passes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.25, 0.001, 2.0])
def test_scaling_keeps_the_load_of_an_instance(name, factor):
    workload = load_workload(name)
    scaled = workload.scaled(factor)
    assert scaled.num_instances == max(1, round(workload.num_instances * factor))
    assert scaled.num_requests % scaled.group_size == 0
    load, was = scaled.num_requests / scaled.num_instances, workload.num_requests / workload.num_instances
    assert abs(load - was) <= workload.group_size / 2 / scaled.num_instances
    assert scaled.times == workload.times


def test_other_values_say_that_they_are_no_longer_the_files():
    changed = load_workload("moonlight").with_values({"times.step_overhead_s": 0.01, "requests.group_size": 16})
    assert changed.times.step_overhead_s == 0.01
    assert changed.group_size == 16
    assert changed.constants["times.step_overhead_s"].source.endswith("overridden")
    with pytest.raises(ConfigError, match=r"times\.step_overhed_s: unknown constant .*did you mean times"):
        changed.with_values({"times.step_overhed_s": 0.01})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda v: v["times"].update(step_overhed_s=1),
            r"times\.step_overhed_s: unknown key in .*did you mean step_over",
        ),
        (lambda v: v["times"].pop("step_overhead_s"), r"times\.step_overhead_s: missing in "),
        (lambda v: v.update(gpu="h100"), "gpu: unknown key"),
        (lambda v: v.update(chip="h80"), "chip: 'h80' is not a choice .*did you mean h800"),
        (lambda v: v.update(vanilla="eagle"), "vanilla: 'eagle' is not a choice"),
        (lambda v: v.update(trace=3), "trace: expected a file"),
        (lambda v: v.update(times=3), "times: expected settings"),
        (lambda v: v["times"].update(step_overhead_s=0.1), r"times\.step_overhead_s: expected settings"),
        (lambda v: v["times"]["step_overhead_s"].update(unit="s"), r"times\.step_overhead_s\.unit: unknown key"),
        (lambda v: v["times"]["step_overhead_s"].update(value="fast"), r"step_overhead_s\.value: expected a number"),
        (lambda v: v["times"]["step_overhead_s"].update(value=-1), r"step_overhead_s\.value: is -1"),
        (lambda v: v["times"]["step_overhead_s"].update(value=float("nan")), r"step_overhead_s\.value: is nan"),
        (lambda v: v["times"]["step_overhead_s"].update(value=float("inf")), r"step_overhead_s\.value: is inf"),
        (lambda v: v["times"]["memory_efficiency"].update(value=1.1), r"memory_efficiency\.value: is 1.1"),
        (lambda v: v["times"]["step_overhead_s"].update(kind="guessed"), r"kind: 'guessed' is not a choice"),
        (lambda v: v["times"]["step_overhead_s"].update(source=""), r"source: expected text"),
        (lambda v: v["cluster"]["page_size"].update(value=1.5), r"page_size\.value: expected an integer"),
        (lambda v: v["requests"]["mean_length"].update(value=70000), r"requests\.mean_length: is 70000"),
        (lambda v: v["requests"]["group_size"].update(value=9999), r"requests\.group_size: is 9999"),
        (lambda v: v["cluster"]["ranks_per_instance"].update(value=3), r"cluster\.ranks_per_instance: is 3"),
        (lambda v: v["model"]["experts_per_token"].update(value=65), r"model\.experts_per_token: is above"),
        (lambda v: v["speculation"]["acceptance_lengths"].update(value=2.0), "expected a list"),
        (lambda v: v["speculation"]["acceptance_lengths"].update(value=[1.5]), "4 entries, acceptance_lengths 1"),
        (lambda v: v["speculation"]["acceptance_references"].update(value=[0, 5, 1, 15]), "ascending from 0"),
        (lambda v: v["speculation"]["acceptance_scale"].update(value=9), "acceptance_scale: gives up to"),
        (lambda v: v["speculation"]["vanilla_mean_drafted"].update(value=0.1), "vanilla_acceptance_length: is 1.67"),
        (lambda v: v.update(paper=[]), "paper: expected figures"),
        (lambda v: v["paper"].update(tail=3), r"paper\.tail: expected figures"),
        (lambda v: v["paper"]["tail"].update(seer_tail_s="long"), r"paper\.tail\.seer_tail_s: expected a number"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, problem):
    with pytest.raises(ConfigError, match=problem):
        load_workload(broken(tmp_path, change))


def test_a_misspelt_name_gets_a_hint():
    with pytest.raises(ConfigError, match=r"no preset 'moonlite' .*did you mean moonlight"):
        load_workload("moonlite")


def test_the_papers_figures_are_there():
    assert load_workload("moonlight").paper["breakdown"] == {"divided": 1.41, "context": 1.47, "full": 1.90}
    assert load_workload("qwen2_vl_72b").paper["length_context"]["oracle"] == 1.63
    assert load_workload("kimi_k2").paper["end_to_end"]["seer_16"] == 1.44


def test_a_workload_travels_to_another_process():
    workload = load_workload("kimi_k2").scaled(0.5)
    assert pickle.loads(pickle.dumps(workload)) == workload
