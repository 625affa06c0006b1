"""Lengths have the mean and the correlation that were asked for."""

import gzip
import json

import numpy as np
import pytest

from seer_jax.core.errors import ConfigError
from seer_jax.sim.lengths import LengthSpec, read_trace, sample_lengths, solve_mu


def spec(**changes) -> LengthSpec:
    return LengthSpec(**{"mean": 7615.0, "limit": 40960, "sigma": 0.9, "correlation": 0.7, **changes})


def draw(lengths: LengthSpec, num_groups: int, group_size: int, seed: int = 0) -> np.ndarray:
    return sample_lengths(lengths, num_groups, group_size, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("mean", "limit", "sigma"),
    [(7615.0, 40960, 0.9), (22386.0, 65536, 0.75), (38959.0, 98304, 0.7), (60000.0, 65536, 2.0), (3.0, 1000, 0.5)],
)
def test_the_mean_is_right_after_clipping(mean, limit, sigma):
    lengths = draw(spec(mean=mean, limit=limit, sigma=sigma, correlation=0.0), 20_000, 10)
    assert lengths.dtype == np.int64
    assert 1 <= lengths.min() <= lengths.max() <= limit
    assert lengths.mean() == pytest.approx(mean, rel=0.01)


def test_mu_of_lengths_that_no_limit_touches_is_the_textbook_one():
    # Mean of a log-normal value: exp(mu + sigma^2 / 2).
    assert solve_mu(spec(mean=1000.0, limit=10**9, sigma=0.5)) == pytest.approx(np.log(1000) - 0.125, abs=1e-9)


@pytest.mark.parametrize("correlation", [0.0, 0.36, 0.8, 1.0])
def test_the_correlation_is_the_share_of_variance_between_groups(correlation):
    logs = np.log(draw(spec(mean=1e5, limit=10**9, sigma=0.5, correlation=correlation), 20_000, 8))
    within = logs.var(axis=1, ddof=1).mean()
    between = logs.mean(axis=1).var(ddof=1) - within / 8
    assert within + between == pytest.approx(0.25, rel=0.03)
    assert between / (within + between) == pytest.approx(correlation, abs=0.02)


def test_the_seed_decides():
    assert (draw(spec(), 5, 4, seed=1) == draw(spec(), 5, 4, seed=1)).all()
    assert (draw(spec(), 5, 4, seed=1) != draw(spec(), 5, 4, seed=2)).any()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mean": 40960.0}, "mean_length"),
        ({"mean": 1.0}, "mean_length"),
        ({"mean": float("nan")}, "mean_length"),
        ({"limit": 1}, "limit"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": float("inf")}, "sigma"),
        ({"correlation": 1.1}, "correlation"),
        ({"correlation": -0.1}, "correlation"),
    ],
)
def test_impossible_lengths_are_refused(changes, field):
    with pytest.raises(ConfigError, match=rf"requests\.{field}"):
        spec(**changes)


def test_a_trace_gives_whole_groups_scaled_to_the_mean(tmp_path):
    # Ten groups of 6; the lengths of group g are 100 (g + 1) .. + 5: the first digits tell groups apart after scaling.
    recorded = 100 * np.arange(1, 11)[:, None] + np.arange(6)
    np.savez(tmp_path / "trace.npz", lengths=recorded)
    lengths = spec(mean=10 * recorded.mean(), limit=100_000, trace=str(tmp_path / "trace.npz"))
    drawn = draw(lengths, 20, 4)
    groups = (drawn // 1000).tolist()
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups[:10]) == sorted(group[0] for group in groups[10:]) == list(range(1, 11))
    assert all(len(set(group)) == 4 for group in drawn.tolist())
    assert set((drawn % 1000).ravel().tolist()) <= {0, 10, 20, 30, 40, 50}


def test_the_mean_of_a_trace_is_right_after_clipping(tmp_path):
    np.savez(tmp_path / "trace.npz", lengths=np.random.default_rng(0).integers(1, 5000, (200, 8)))
    drawn = draw(spec(mean=2000.0, limit=3000, trace=str(tmp_path / "trace.npz")), 200, 8)
    assert drawn.max() == 3000
    assert drawn.mean() == pytest.approx(2000, rel=0.001)


def test_recorded_responses_are_a_trace_too(tmp_path):
    np.savez(tmp_path / "trace.npz", offsets=np.array([0, 5, 9, 16]), group=np.array([1, 0, 1]))
    assert [group.tolist() for group in read_trace(tmp_path / "trace.npz")] == [[4], [5, 7]]


def test_lines_are_grouped_if_they_say_so(tmp_path):
    (tmp_path / "trace.jsonl").write_text(
        '{"group": "a", "length": 3}\n{"group": "b", "length": 4}\n{"group": "a", "length": 5}\n'
    )
    assert [group.tolist() for group in read_trace(tmp_path / "trace.jsonl")] == [[3, 5], [4]]


def test_lines_without_groups_give_lengths_without_structure(tmp_path):
    with gzip.open(tmp_path / "trace.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"timestamp": 0, "output_length": length}) + "\n" for length in (10, 20, 30))
    assert read_trace(tmp_path / "trace.jsonl.gz").tolist() == [10, 20, 30]
    drawn = draw(spec(mean=20.0, limit=1000, trace=str(tmp_path / "trace.jsonl.gz")), 50, 4)
    assert set(drawn.ravel().tolist()) == {10, 20, 30}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "line 1 of .* has no `length`"),
        ('{"length": 1.5}', "`length` of line 1 of .* is 1.5"),
        ('{"length": 1}\nx', "line 2 of .* is no JSON"),
        ('{"length": 0}', "has a length of 0"),
        ('{"length": 1}\n{"length": 1, "group": 2}', "only some lines"),
        ('{"length": 1, "group": [2]}', "`group` of line 1"),
        ("", "is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, problem):
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_trace(tmp_path / "trace.jsonl")


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"length": np.ones((2, 2), int)}, "holds length"),
        ({"lengths": np.ones((2, 2))}, "`lengths` of .* is float64"),
        ({"lengths": np.ones(2, int)}, r"`lengths` of .* is int64 \[2\]"),
        ({"lengths": np.zeros((2, 2), int)}, "has a length of 0"),
        ({"offsets": np.arange(3), "group": np.zeros(3, int)}, "`group` of .* has 3 entries"),
    ],
)
def test_bad_arrays_are_named(tmp_path, arrays, problem):
    np.savez(tmp_path / "trace.npz", **arrays)
    with pytest.raises(ConfigError, match=problem):
        read_trace(tmp_path / "trace.npz")


def test_bad_files_are_named(tmp_path):
    (tmp_path / "trace.npz").write_text("no archive")
    (tmp_path / "trace.csv").write_text("1")
    for name, problem in (("trace.npz", "cannot be read"), ("trace.csv", "no known kind"), ("none.npz", "no file")):
        with pytest.raises(ConfigError, match=problem):
            read_trace(tmp_path / name)


def test_groups_that_are_too_small_are_an_error(tmp_path):
    np.savez(tmp_path / "trace.npz", lengths=np.full((3, 4), 100))
    with pytest.raises(ConfigError, match="group of 4, 8 are to be drawn"):
        draw(spec(mean=50.0, trace=str(tmp_path / "trace.npz")), 3, 8)
