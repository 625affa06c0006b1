"""A named implementation is the one that runs."""

import pytest

from kernels_pallas._dispatch import select


def test_a_name_is_taken_literally_and_none_takes_the_first():
    table = {"fast": lambda: "fast", "reference": lambda: "reference"}
    assert select("k", table, "reference")() == "reference"
    assert select("k", table, None)() == "fast"


def test_a_name_that_does_not_exist_never_falls_back():
    with pytest.raises(ValueError, match=r"mla_attention.*'pallas_gpu'.*fast"):
        select("mla_attention", {"fast": print}, "pallas_gpu")
