"""Results of experiments: statistics, and files that other programs can read."""

import csv
import json
import math
from pathlib import Path

import pytest

from seer_jax.sim.report import CSV_COLUMNS, Figure, WorkloadResult, to_json, write_csv
from tests.sim.results import make_figure, make_result


def test_a_figure_is_summed_up_over_its_seeds_and_against_the_paper():
    figure = make_figure("divided", 1.0, 2.0, 3.0, paper=1.6)
    assert (figure.mean, figure.spread) == (2.0, 1.0)
    assert figure.error == pytest.approx(0.25)
    assert make_figure("divided", 1.2).spread == 0.0


@pytest.mark.parametrize("paper", [None, 0.0])
def test_there_is_no_error_against_nothing(paper):
    assert make_figure(paper=paper).error is None


@pytest.mark.parametrize(
    "changes",
    [{"per_seed": ()}, {"per_seed": (1.0, math.nan)}, {"per_seed": (math.inf,)}, {"paper": math.nan}, {"kind": "x"}],
)
def test_a_figure_that_would_mislead_is_refused(changes):
    values = {"name": "divided", "per_seed": (1.0,), "paper": 1.0, "kind": "fitted", "unit": "s"}
    with pytest.raises(ValueError, match="figure 'divided'"):
        Figure(**values | changes)


@pytest.mark.parametrize("names", [("divided", "divided"), ("details",), ("constants",)])
def test_names_that_would_overwrite_each_other_are_refused(names):
    with pytest.raises(ValueError, match="given twice"):
        WorkloadResult(workload="moonlight", figures=tuple(map(make_figure, names)), constants={})


def test_json_has_plain_means_first_and_everything_else_below():
    data = to_json(make_result("breakdown", "moonlight", "kimi_k2"))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["simulated"] is True
    assert (data["experiment"], data["source"], data["seeds"]) == ("breakdown", "Table 4", [100, 101, 102])
    assert list(data["workloads"]) == ["moonlight", "kimi_k2"]
    moonlight = data["workloads"]["moonlight"]
    assert (moonlight["divided"], moonlight["context"]) == (2.0, 1.5)
    assert moonlight["details"]["divided"] == {
        "mean": 2.0, "spread": 1.0, "ci95": pytest.approx(4.303 / 3**0.5),
        "per_seed": [1.0, 2.0, 3.0], "paper": 1.5, "error": pytest.approx(1 / 3),
        "kind": "predicted", "unit": "x veRL",
    }  # fmt: skip
    assert moonlight["details"]["context"]["error"] is None
    assert moonlight["constants"]["step_overhead_s"] == {
        "value": 0.03, "kind": "fitted", "source": "veRL's rollout time",
    }  # fmt: skip
    assert type(moonlight["constants"]["step_overhead_s"]["value"]) is float
    assert data["firings"] == {"chunks": 12}


def test_csv_has_one_row_per_workload_figure_and_seed(tmp_path: Path):
    write_csv(make_result("breakdown", "moonlight", "kimi_k2"), tmp_path / "b.csv")
    with (tmp_path / "b.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 2 * 3 * 3
    assert rows[1] == {
        "experiment": "breakdown", "workload": "moonlight", "figure": "divided", "unit": "x veRL", "seed": "101",
        "value": "2.0", "paper": "1.5", "kind": "predicted",
    }  # fmt: skip
    assert rows[3]["paper"] == ""
