"""`seer-jax simulate` around experiments that are replaced: what it asks for, prints and writes."""

import csv
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from seer_jax.cli import simulate
from seer_jax.cli.main import main
from seer_jax.core.errors import ConfigError
from tests.sim.results import make_result

EXPERIMENTS = {"breakdown": "what each part adds", "utilization": "load over time"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Replaces what simulates; gives the calls."""
    made: list[dict] = []

    def run_experiment(name: str, workloads: list[str], **options: object) -> object:
        made.append({"name": name, "workloads": list(workloads), **options})
        names = [Path(workload).stem for workload in workloads]
        result = make_result(name, *names, timelines=name == "utilization")
        seeds = options["seeds"]
        short = [
            replace(w, figures=tuple(replace(f, per_seed=f.per_seed[: len(seeds)]) for f in w.figures))
            for w in result.workloads
        ]
        return replace(result, seeds=seeds, scale=options["scale"], workloads=tuple(short))

    def load_workload(name_or_path: str) -> SimpleNamespace:
        if name_or_path.endswith(".yaml") and not Path(name_or_path).is_file():
            raise ConfigError("workload", f"no file {name_or_path!r}")
        return SimpleNamespace(name=Path(name_or_path).stem)

    replace_module(monkeypatch, "experiments", EXPERIMENTS=EXPERIMENTS, run_experiment=run_experiment)
    replace_module(monkeypatch, "workloads", load_workload=load_workload)
    return made


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    module = ModuleType(f"seer_jax.sim.{name}")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def simulate_(*argv: str) -> int:
    return main(["simulate", "--seeds", "3", *argv])


def test_one_experiment_is_one_object_on_stdout_and_files(
    calls: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ("--experiment", "breakdown", "--workload", "kimi_k2,moonlight", "--scale", "0.5", "--jobs", "1")
    assert simulate_(*argv, "--out", str(out), "--json") == 0
    assert calls == [
        {"name": "breakdown", "workloads": ["kimi_k2", "moonlight"], "seeds": (100, 101, 102), "jobs": 1, "scale": 0.5}
    ]
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert report["simulated"] is True and report["out"] == str(out)
    assert list(report["workloads"]) == ["kimi_k2", "moonlight"]
    assert report["workloads"]["kimi_k2"]["divided"] == 2.0
    assert sorted(file.name for file in out.iterdir()) == [
        "breakdown.csv", "breakdown.json", "breakdown.png", "breakdown.svg",
    ]  # fmt: skip
    written = json.loads((out / "breakdown.json").read_text())
    assert written["workloads"] == report["workloads"]
    with (out / "breakdown.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 3 * 3


def test_all_experiments_of_all_workloads_with_timelines_as_charts_and_traces(
    calls: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate_("--experiment", "all", "--out", str(tmp_path), "--first-seed", "7", "--json") == 0
    assert [call["name"] for call in calls] == ["breakdown", "utilization"]
    assert all(call["workloads"] == ["moonlight", "qwen2_vl_72b", "kimi_k2"] for call in calls)
    assert calls[0]["seeds"] == (7, 8, 9) and calls[0]["jobs"] == 2 and calls[0]["scale"] == 1.0
    report = json.loads(capsys.readouterr().out)
    assert report["simulated"] is True and list(report["experiments"]) == ["breakdown", "utilization"]
    names = {file.name for file in tmp_path.iterdir()}
    for workload in ("moonlight", "qwen2_vl_72b", "kimi_k2"):
        expected = {f"utilization_{workload}.png", f"utilization_{workload}.svg"}
        assert names >= expected | {f"trace_{workload}_{label}.json.gz" for label in ("veRL", "Seer")}
    trace = json.loads(gzip.decompress((tmp_path / "trace_kimi_k2_Seer.json.gz").read_bytes()))["traceEvents"]
    assert {e["args"]["name"] for e in trace if e["name"] == "process_name"} == {f"instance {i}" for i in range(3)}
    assert sum(e["ph"] == "X" for e in trace) == 12
    assert {e["name"] for e in trace if e["ph"] == "C"} == {"running requests", "KV utilization"}


def test_people_see_mean_spread_paper_error_and_that_it_is_simulated(
    calls: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--experiment", "breakdown", "--workload", "moonlight", "--out", str(tmp_path), "--no-plots")
    assert simulate_(*argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("breakdown: ") and "Table 4" in lines[0]
    assert lines[1].startswith("simulated, seeds 100–102")
    words = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert words["divided"] == ["2.000", "±", "1.000", "1.500", "+33.3%", "x", "veRL", "predicted"]
    assert words["context"] == ["1.500", "±", "0.000", "-", "-", "x", "veRL", "fitted"]
    assert lines[-1].startswith("simulated in ") and lines[-1].endswith(f"written to {tmp_path}")
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_everything_but_the_charts_is_written(
    calls: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "has_matplotlib", lambda: False)
    argv = ("--experiment", "breakdown", "--out", str(tmp_path), "--json")
    assert simulate_(*argv) == 0
    assert "pip install 'seer_jax[plots]'" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["breakdown.csv", "breakdown.json"]
    assert simulate_(*argv, "--no-plots") == 0
    assert "matplotlib" not in capsys.readouterr().err


def test_one_seed_has_no_spread_and_a_file_may_be_a_workload(
    calls: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("")
    argv = ["--experiment", "breakdown", "--workload", str(tmp_path / "mine.yaml"), "--seeds", "1"]
    assert main(["simulate", *argv, "--out", str(tmp_path / "{name}-{time}")]) == 0
    assert "±" not in capsys.readouterr().out
    (out,) = tmp_path.glob("simulate-*")
    assert "mine" in json.loads((out / "breakdown.json").read_text())["workloads"]


@pytest.mark.parametrize("json_too", [False, True])
def test_the_list_names_experiments_and_workloads(
    calls: list[dict], capsys: pytest.CaptureFixture[str], json_too: bool
) -> None:
    assert main(["simulate", "--list"] + ["--json"] * json_too) == 0
    text = capsys.readouterr().out
    assert calls == [] and all(name in text for name in (*EXPERIMENTS, "moonlight", "qwen2_vl_72b", "kimi_k2"))
    if json_too:
        assert json.loads(text)["experiments"] == EXPERIMENTS


BAD_INPUT = [
    (["--experiment", "brakdown"], "experiment: no experiment 'brakdown' (did you mean breakdown?)"),
    (["--experiment", "breakdown,"], "experiment: no experiment ''"),
    (["--workload", "monlight"], "workload: no workload 'monlight' (did you mean moonlight?)"),
    (["--workload", "nothing.yaml"], "workload: no file 'nothing.yaml'"),
    (["--workload", "moonlight,a/moonlight.yaml"], "workload: two are named 'moonlight'"),
    (["--seeds", "0"], "seeds: is 0 (at least 1)"),
    (["--first-seed", "-1"], "first_seed: is -1"),
    (["--jobs", "0"], "jobs: is 0"),
    (["--scale", "0"], "scale: is 0.0"),
    (["--scale", "nan"], "scale:"),
    (["--scale", "1e9"], "scale: is 1000000000.0 (above 0, at most 100"),
    (["--out", "a/moonlight.yaml/x"], "out: cannot write to 'a/moonlight.yaml/x'"),
    (["--out", "{nme}"], "out: cannot be filled in: '{nme}'"),
    (["--replay", "nowhere"], "profile: is not given, --replay is"),
    (["--profile", "p.json"], "replay: is not given, --profile is"),
    (["--replay", "nowhere", "--profile", "nothing.json"], "profile: cannot read 'nothing.json'"),
    (["--experimnt", "breakdown"], "--experimnt: unknown option (did you mean --experiment?)"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_INPUT, ids=[" ".join(argv) for argv, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_nothing_is_simulated_or_written(
    calls: list[dict],
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "moonlight.yaml").write_text("")
    assert main(["simulate", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"seer-jax: error: {message}") and captured.err.count("\n") == 1
    assert captured.out == "" and calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_simulation_needs_neither_jax_nor_ray() -> None:
    script = """
import contextlib, sys
import seer_jax
import seer_jax.cli.simulate, seer_jax.sim.outputs
from seer_jax.cli.main import main
with contextlib.suppress(SystemExit):
    main(["simulate", "--help"])
assert main(["simulate", "--list"]) == 0
import seer_jax.sim.beyond, seer_jax.sim.replay
loaded = {"jax", "flax", "ray", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert "--first-seed" in finished.stdout
