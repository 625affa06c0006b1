"""Charts: files for browser and paper, everything labelled, and a clear word where matplotlib is missing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seer_jax.core.errors import ConfigError
from seer_jax.obs import plots
from seer_jax.obs.plots import Bar, BarPanel, Series, plot_bars, plot_timelines

PNG = b"\x89PNG\r\n\x1a\n"


def panel(title: str, num_bars: int = 3, *, paper: float | None = 1.4) -> BarPanel:
    bars = tuple(Bar(label=f"part_{i}", ours=1.2 + i, spread=0.1, paper=paper) for i in range(num_bars))
    return BarPanel(title=title, unit="x veRL", bars=bars)


def series(label: str, instances: int = 3) -> Series:
    times_s = np.linspace(0.0, 100.0, 50)
    running = np.maximum(0, 30 - np.arange(50)[:, None] + np.arange(instances)[None, :])
    return Series(label=label, times_s=times_s, running=running, kv_utilization=running / 40)


def check(files: list[Path], *texts: str) -> None:
    png, svg = files
    assert png.read_bytes().startswith(PNG) and png.suffix == ".png"
    drawing = svg.read_text()
    assert "<svg" in drawing and svg.suffix == ".svg"
    for text in texts:
        assert f"<!-- {text} -->" in drawing


@pytest.mark.parametrize(
    "panels",
    [
        (panel("moonlight"), panel("kimi_k2")),
        tuple(panel(f"w{i}", 8) for i in range(3)),
        tuple(BarPanel(title=w, unit=u, bars=panel(w).bars) for w in ("a", "b", "c") for u in ("s", "share"))[:5],
        (panel("no paper", paper=None),),
        (panel("one", 1),),
    ],
    ids=["beside", "below", "units", "without a paper", "one bar"],
)
def test_bars_are_drawn_with_the_title_and_every_label(tmp_path: Path, panels: tuple[BarPanel, ...]):
    files = plot_bars(panels, tmp_path / "breakdown.v1", title="Throughput", caption="simulated")
    assert [file.name for file in files] == ["breakdown.v1.png", "breakdown.v1.svg"]
    check(files, "Throughput", "part 0", "simulated", *(one.title for one in panels))


def test_timelines_are_drawn_with_both_systems(tmp_path: Path):
    files = plot_timelines([series("veRL"), series("Seer", 1)], tmp_path / "u", title="Utilization")
    check(files, "veRL", "Seer", "simulated time in s", "mean of the instances")


def test_the_same_chart_is_the_same_file(tmp_path: Path):
    first = plot_bars([panel("a")], tmp_path / "first", title="t")
    second = plot_bars([panel("a")], tmp_path / "second", title="t")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert not plots.has_matplotlib()
    message = r"^plots: matplotlib is not installed \(pip install 'seer_jax\[plots\]'\)$"
    for draw, data in ((plot_bars, [panel("a")]), (plot_timelines, [series("a")])):
        with pytest.raises(ConfigError, match=message):
            draw(data, tmp_path / "x", title="t")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_loaded_only_to_draw():
    script = "import seer_jax.obs.plots, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
