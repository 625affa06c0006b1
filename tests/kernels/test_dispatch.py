"""A named implementation is the one that runs; without a name the platform's own does, or another, visibly."""

import warnings
from types import SimpleNamespace

import jax
import pytest

from kernels_pallas import _dispatch
from kernels_pallas._dispatch import Choice, choose, select, why_not_device

TABLE = {"xla": lambda: "xla", "reference": lambda: "reference", "pallas_tpu": lambda: "pallas_tpu"}


def test_a_name_is_taken_literally():
    assert select("k", TABLE, "reference")() == "reference"
    assert select("k", TABLE, "pallas_tpu", {"pallas_tpu": "rows too wide"})() == "pallas_tpu"


def test_a_name_that_does_not_exist_never_falls_back():
    with pytest.raises(ValueError, match=r"mla_attention.*'pallas_gpu'.*fast"):
        select("mla_attention", {"fast": print}, "pallas_gpu")


@pytest.mark.parametrize(
    ("platform", "refusal", "choice"),
    [
        ("cpu", None, Choice("xla", "best on cpu")),
        ("tpu", None, Choice("pallas_tpu", "best on tpu")),
        ("gpu", None, Choice("xla", "there is no pallas_gpu yet")),
        ("cpu", "rows too wide", Choice("xla", "best on cpu")),
        ("tpu", "rows too wide", Choice("xla", "pallas_tpu cannot serve this call: rows too wide", True)),
    ],
)
def test_without_a_name_the_platform_chooses(platform, refusal, choice):
    assert choose(TABLE, platform, {"pallas_tpu": refusal}) == choice


def test_a_kernel_that_never_ran_on_its_platform_serves_only_by_name():
    table = TABLE | {"pallas_gpu": lambda: "pallas_gpu"}
    choice = Choice("xla", "pallas_gpu must be named: it has never run on a gpu")
    assert choose(table, "gpu") == choose(table, "gpu", {"pallas_gpu": "rows too wide"}) == choice
    assert select("k", table, "pallas_gpu")() == "pallas_gpu"


def test_falling_back_is_seen_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    _dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="k: xla serves instead, because pallas_tpu cannot .* rows too wide"):
        assert select("k", TABLE, None, {"pallas_tpu": "rows too wide"})() == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select("k", TABLE, None, {"pallas_tpu": "rows too wide"})() == "xla"
        assert select("k", TABLE, None)() == "pallas_tpu"


@pytest.mark.parametrize("capability", ["8.0", "10.0", "gfx942"])
def test_the_hopper_kernels_are_for_no_other_gpu(capability):
    gpu = SimpleNamespace(platform="gpu", device_kind="some GPU", compute_capability=capability)
    assert why_not_device("pallas_gpu", gpu) == (
        f"pallas_gpu is for GPUs of compute capability 9.0 (Hopper), some GPU has {capability}"
    )
    assert why_not_device("pallas_tpu", gpu) == "pallas_tpu does not run on a gpu"
    assert {why_not_device(name, gpu) for name in ("auto", "xla", "reference")} == {None}
    gpu.compute_capability = "9.0"
    assert why_not_device("pallas_gpu", gpu) is None
