"""The experiments, small: figures have the paper's names, options that never fire are found, bounds hold."""

import numpy as np
import pytest

from seer_jax.core.errors import ConfigError
from seer_jax.sim import beyond
from seer_jax.sim.beyond import LOW_CORRELATION, compare_options, least_time_s, options_of, with_options
from seer_jax.sim.experiments import EXPERIMENTS, _kind, run_experiment
from seer_jax.sim.partial import simulate_partial
from seer_jax.sim.report import to_json
from seer_jax.sim.systems import SYSTEMS, draw_requests, find_system, simulate
from seer_jax.sim.workloads import load_workload

SMALL = 0.03
"""Of Moonlight: one instance, 100 requests."""


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - {"beyond_seer", "partial_rollout"}))
def test_every_figure_of_the_paper_is_simulated(name):
    result = run_experiment(name, ["moonlight"], seeds=(5,), jobs=1, scale=SMALL)
    figures = {figure.name: figure for figure in result.workloads[0].figures}
    paper = load_workload("moonlight").paper.get(name, {})
    assert paper.keys() <= figures.keys()
    assert all(figures[key].paper == value for key, value in paper.items())
    assert all(np.isfinite(figure.mean) for figure in figures.values())
    assert result.experiment == name and result.seeds == (5,)


def test_breakdown_has_the_form_that_is_promised_and_two_processes_give_what_one_gives():
    one = to_json(run_experiment("breakdown", ["moonlight"], seeds=(5, 6), jobs=1, scale=SMALL))
    two = to_json(run_experiment("breakdown", ["moonlight"], seeds=(5, 6), jobs=2, scale=SMALL))
    figures = one["workloads"]["moonlight"]
    assert {"divided", "context", "full", "tail_reduction"} <= figures.keys()
    assert all(figures[name] == two["workloads"]["moonlight"][name] for name in ("divided", "context", "full"))
    details = figures["details"]["full"]
    assert details["kind"] == "fitted" and details["paper"] == 1.9 and len(details["per_seed"]) == 2
    assert figures["constants"]["times.step_overhead_s"]["kind"] == "fitted"


def test_utilization_keeps_the_course_of_the_first_seed():
    result = run_experiment("utilization", ["moonlight"], seeds=(5, 6), jobs=1, scale=SMALL)
    timelines = result.workloads[0].timelines
    assert [timeline.label for timeline in timelines] == ["veRL", "Seer"]
    for timeline in timelines:
        assert timeline.running.shape == (len(timeline.times_s), 1)
        assert timeline.running.max() > 50 and timeline.running[-1, 0] <= 1
        assert 0.5 < timeline.kv_utilization.max() <= 1
    assert sum(name.endswith("#0") for _, name, _, _ in timelines[1].spans) == 104 - 8
    assert all(start <= end for _, _, start, end in timelines[0].spans)


def test_group_size_is_a_variation_of_end_to_end():
    result = run_experiment("end_to_end", ["moonlight"], seeds=(5,), jobs=1, scale=SMALL)
    figures = {figure.name: figure.mean for figure in result.workloads[0].figures}
    assert figures["verl_8"] == figures["verl_16"] == 1
    assert figures["seer_8"] != figures["seer_16"]


def test_partial_rollout_prefers_short_answers_and_carries_tokens_over():
    values = simulate_partial(load_workload("moonlight").scaled(SMALL), 5)
    assert values["seer_gain"] > 0
    assert 0 < values["carried_share"] < 1
    assert 0 < values["mean_length_share"] < 1.5


def test_options_beyond_the_paper_are_compared_on_the_same_requests(monkeypatch):
    chosen = {"half_chunk": {"chunk_size": 4096}, "trees": {"speculation": "grouped_tree"}}
    monkeypatch.setattr(beyond, "options_of", lambda workload: chosen)
    cheap = {"times.draft_overhead_per_token_s": 1e-6}
    values, fired = compare_options(load_workload("moonlight").scaled(SMALL).with_values(cheap), 5)
    assert {"half_chunk", "half_chunk_low", "trees", "bound_a_order", "bound_work"} <= values.keys()
    assert fired["moonlight:trees:grouped_tree"] > 0 and fired["moonlight:half_chunk:chunk_size"] > 0
    assert all(0.5 < value < 3 for name, value in values.items() if name != "bound_g_idle")
    assert values["bound_work"] >= max(values["half_chunk"], values["trees"], values["bound_a_order"])


def test_an_option_that_never_fires_is_counted_as_such(monkeypatch):
    monkeypatch.setattr(beyond, "options_of", lambda workload: {"posterior": {"length_estimator": "posterior"}})
    # Groups of one: every request is a probe, and no probe is picked by an estimate.
    alone = load_workload("moonlight").scaled(SMALL).with_values({"requests.group_size": 1})
    assert compare_options(alone, 5)[1] == {"moonlight:posterior:posterior": 0}


@pytest.mark.parametrize("name", ["moonlight", pytest.param("kimi_k2", marks=pytest.mark.slow)])
def test_no_system_is_faster_than_the_bound(name):
    workload = load_workload(name).scaled(SMALL)
    requests = draw_requests(workload, 5)
    least_s = least_time_s(workload, requests)
    for system in (SYSTEMS["seer"], SYSTEMS["verl_grouped_sd"]):
        assert simulate(workload, system, requests, seed=5).rollout_time_s > least_s


def test_lower_correlation_keeps_mean_and_limit():
    workload = load_workload("moonlight").with_values({"requests.correlation": LOW_CORRELATION})
    lengths = draw_requests(workload, 5).lengths
    assert lengths.mean() == pytest.approx(workload.lengths.mean, rel=0.1)
    assert lengths.max() <= workload.lengths.limit


@pytest.mark.parametrize("name", ["moonlight", "qwen2_vl_72b", "kimi_k2"])
def test_every_option_is_a_setting_that_differs_from_the_workloads_own(name):
    workload = load_workload(name)
    for option, settings in options_of(workload).items():
        assert with_options(option, settings).policy == "seer"
        assert settings.get("chunk_size") != workload.chunk_size


@pytest.mark.parametrize(
    ("points", "x", "expected"),
    [
        ([(0, 4), (1, 1), (2, 4)], 1.0, 1.0),
        ([(0, 0), (1, 3), (2, 2)], 1.0, 1.0),  # The chord from the first to the last lies below the middle.
        ([(0, 0), (1, 3), (2, 2)], 0.5, 0.5),
    ],
)
def test_convex_envelope(points, x, expected):
    xs, ys = np.array(points, np.float64).T
    assert beyond._convex_envelope(xs, ys, x) == pytest.approx(expected)


def test_kinds_of_figures():
    kimi = load_workload("kimi_k2")
    kinds = {
        (name, figure): _kind(name, figure, kimi)
        for name, figure in [
            ("breakdown", "full"), ("end_to_end", "seer_8"), ("end_to_end", "seer_16"), ("end_to_end", "verl_8"),
            ("end_to_end", "verl_sd_8"), ("sd_strategies", "vanilla_tau"), ("partial_rollout", "seer_gain"),
        ]
    }  # fmt: skip
    assert list(kinds.values()) == ["fitted", "fitted", "predicted", "input", "fitted", "input", "predicted"]
    assert _kind("sd_strategies", "vanilla_gain", load_workload("moonlight")) == "predicted"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run_experiment("breakdwon", ["moonlight"], seeds=(1,)), "did you mean .*breakdown"),
        (lambda: run_experiment("breakdown", ["moonlight"], seeds=(1,), jobs=0), "jobs: is 0"),
        (lambda: run_experiment("breakdown", ["moonlihgt"], seeds=(1,)), "moonlight"),
        (lambda: find_system("sear"), "did you mean .*seer"),
    ],
)
def test_wrong_names_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
