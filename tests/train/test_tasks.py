"""Tasks: prompts are reproducible, splits disjoint, rewards exact, and a wrong file or name is said plainly."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.config.schema import DataConfig
from seer_jax.core.errors import ConfigError
from seer_jax.train.rewards import judge
from seer_jax.train.tasks import length_statistics, make_task
from seer_jax.train.tasks.chain_sum import MAX_OPERANDS, ChainSum, make_prompt, score_answer, split_of, write_chain
from seer_jax.train.tokenizer import BOS_ID, decode, encode

operand_lists = st.lists(
    st.integers(1, 9).flatmap(lambda d: st.sampled_from([-d, d])), min_size=2, max_size=MAX_OPERANDS
)


def response_length_reward(prompt, response, record):
    """A reward function of a user's, imported by name below."""
    return float(len(response))


def test_chain_sum_format_is_as_documented():
    operands = [7, -5, 3]
    rng = np.random.default_rng(0)
    prompt = make_prompt(operands)
    assert prompt.text == "a+7b-5c+3?"
    assert prompt.token_ids[0] == BOS_ID and decode(prompt.token_ids) == prompt.text
    assert write_chain(operands, 1, 0.0, rng) == "a+7=07 b-5=02 c+3=05 #05"
    assert write_chain(operands, 2, 0.0, rng) == "a+7b-5=02 c+3=05 #05"


@given(operand_lists, st.integers(1, 2))
def test_a_chain_without_errors_earns_the_reward_and_a_truncated_one_does_not(operands, step_size):
    task, prompt = ChainSum(), make_prompt(operands)
    chain = write_chain(operands, step_size, 0.0, np.random.default_rng(0))
    assert judge(task.reward_function, prompt, encode(chain)) == 1.0
    assert all(judge(task.reward_function, prompt, encode(chain[:cut])) == 0.0 for cut in range(len(chain)))


@given(st.text())
def test_garbage_earns_nothing(text):
    assert score_answer("a+1b+1?", text.replace("#", ""), {"answer": "02"}) == 0.0
    assert score_answer("a+1b+1?", text + "#3", {"answer": "02"}) == 0.0


def test_an_injected_error_is_carried_on():
    chain = write_chain([7, -5, 3], 1, 1.0, np.random.default_rng(1))
    totals = [int(step[-2:]) for step in chain.split(" ")[:-1]]
    expected = [previous + value for previous, value in zip([0, *totals[:2]], [7, -5, 3], strict=True)]
    slips = [(total - wanted) % 100 for total, wanted in zip(totals, expected, strict=True)]
    assert all(slip in (1, 10, 90, 99) for slip in slips)
    assert chain.endswith(f"#{totals[-1]:02d}")


def test_prompts_depend_on_seed_split_and_index_only():
    task = ChainSum()
    texts = [p.text for p in task.make_prompts(3, "train", 20)]
    assert [p.text for p in task.make_prompts(3, "train", 12, start=8)] == texts[8:]
    assert texts != [p.text for p in task.make_prompts(4, "train", 20)]
    assert len(set(texts)) > 15


def test_splits_are_disjoint_whatever_the_seed():
    task = ChainSum()
    for seed in range(3):
        assert all(split_of(p.text) == "train" for p in task.make_prompts(seed, "train", 100))
        assert all(split_of(p.text) == "heldout" for p in task.make_prompts(seed, "heldout", 30))


def test_prompt_lengths_are_heavy_tailed():
    counts = np.array([p.record["num_operands"] for p in ChainSum().make_prompts(0, "train", 2000)])
    assert 10 < counts.mean() < 14
    assert counts.max() == MAX_OPERANDS and counts.max() > 4 * counts.mean()


def test_the_longest_prompt_of_chain_sum_is_known_and_reached():
    task = ChainSum()
    assert max(len(p.token_ids) for p in task.make_prompts(0, "train", 2000)) == task.max_prompt_tokens == 158


@pytest.fixture
def jsonl(tmp_path):
    def write(lines):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(lines))
        return DataConfig(task="jsonl", path=str(path), reward=f"{__name__}:response_length_reward", heldout_prompts=3)

    return write


def records(count):
    return [json.dumps({"prompt": f"question {i}"}) for i in range(count)]


def test_jsonl_holds_out_the_last_records_and_shuffles_the_others_every_pass(jsonl):
    task = make_task(jsonl(records(10)))
    assert [p.text for p in task.make_prompts(0, "heldout", 3)] == ["question 7", "question 8", "question 9"]
    texts = [p.text for p in task.make_prompts(0, "train", 21)]
    passes = [texts[:7], texts[7:14], texts[14:]]
    assert all(sorted(p) == [f"question {i}" for i in range(7)] for p in passes)
    assert passes[0] != passes[1]
    assert [p.text for p in task.make_prompts(0, "train", 9, start=5)] == texts[5:14]
    assert task.reward_function("", "four", {}) == 4.0


def test_jsonl_takes_token_ids_as_they_are(jsonl):
    task = make_task(jsonl([*records(3), json.dumps({"prompt_token_ids": [500, 104, 105]})][::-1]))
    prompt = task.make_prompts(0, "train", 1)[0]
    assert prompt.token_ids.tolist() == [500, 104, 105]
    assert prompt.text == "hi"


def test_the_longest_prompt_of_a_file_may_be_one_held_out(jsonl):
    long = json.dumps({"prompt_token_ids": [1] * 77})
    assert make_task(jsonl([*records(5), long])).max_prompt_tokens == 77
    assert make_task(jsonl([long, *records(5)])).max_prompt_tokens == 77


@pytest.mark.parametrize(
    "lines, said",
    [
        ([], "data.path: .*no record"),
        (["", "  "], "data.path: .*no record"),
        ([*records(4), "{oops"], "data.path: .*line 5 is no JSON"),
        ([*records(4), "[1]"], "data.path: .*line 5 is no JSON object"),
        ([*records(4), '{"question": "?"}'], "data.path: .*line 5 has no text `prompt`"),
        ([*records(4), '{"prompt_token_ids": [1, -1]}'], "data.path: .*line 5 has no text `prompt`"),
        (records(3), "data.heldout_prompts: 3 of the 3 records"),
    ],
)
def test_a_bad_file_is_named_with_line_and_fix(jsonl, lines, said):
    with pytest.raises(ConfigError, match=said):
        make_task(jsonl(lines))


@pytest.mark.parametrize(
    "data, said",
    [
        (DataConfig(task="chain_summ"), r"data.task: no task 'chain_summ' \(one of chain_sum, jsonl\)"),
        (DataConfig(task="jsonl"), "data.path: is not set"),
        (DataConfig(task="jsonl", path="nowhere.jsonl"), "data.reward: is not set"),
        (DataConfig(task="jsonl", path="nowhere.jsonl", reward="math:floor"), "data.path: cannot read 'nowhere.jsonl'"),
        (DataConfig(reward="no_colon"), "data.reward: 'no_colon' names no function"),
        (DataConfig(reward="no_such_module:f"), "data.reward: cannot import 'no_such_module'"),
        (DataConfig(reward="math:no_such_function"), "data.reward: 'math' has no function 'no_such_function'"),
        (DataConfig(reward="math:pi"), "data.reward: 'math' has no function 'pi'"),
    ],
)
def test_a_bad_setting_is_named(data, said):
    with pytest.raises(ConfigError, match=said):
        make_task(data)


def test_a_configured_reward_replaces_the_task_s_own():
    task = make_task(DataConfig(reward=f"{__name__}:response_length_reward"))
    assert task.reward_function("", "12345", {}) == 5.0


def import_in(directory, module, text):
    """Make a task with a reward of a module in a directory, as the console script would that is started there."""
    (directory / f"{module}.py").write_text(text)
    script = f"""
from seer_jax.config.schema import DataConfig
from seer_jax.core.errors import ConfigError
from seer_jax.train.tasks import make_task
try:
    print(make_task(DataConfig(reward="{module}:f")).reward_function("", "", {{}}))
except ConfigError as error:
    print(error)
"""
    # -P: like a console script, without the current directory on the path.
    command, root = [sys.executable, "-P", "-c", script], str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_a_reward_is_found_in_the_current_directory(tmp_path):
    assert import_in(tmp_path, "my_mod", "def f(prompt, response, record): return 0.25") == "0.25\n"


def test_a_module_that_crashes_when_imported_is_an_error_with_its_text(tmp_path):
    said = import_in(tmp_path, "my_mod", "1 / 0")
    assert said.startswith("data.reward: cannot import 'my_mod': ZeroDivisionError: division by zero (")


def test_group_correlation_is_one_for_equal_groups_and_none_for_shuffled_lengths():
    rng = np.random.default_rng(0)
    equal = np.repeat(rng.integers(10, 500, (64, 1)), 8, axis=1)
    assert length_statistics(equal, 512).group_correlation == pytest.approx(1.0)
    shuffled = rng.permutation(equal.ravel()).reshape(equal.shape)
    assert abs(length_statistics(shuffled, 512).group_correlation) < 0.1


def test_group_correlation_recovers_a_known_ratio_of_variances():
    rng = np.random.default_rng(1)
    lengths = 200 + 30 * rng.standard_normal((4000, 1)) + 20 * rng.standard_normal((4000, 8))
    stats = length_statistics(lengths, 512)
    assert stats.group_correlation == pytest.approx(900 / 1300, abs=0.03)
    assert stats.mean == pytest.approx(200, abs=2)
    assert stats.limit_over_mean == pytest.approx(512 / stats.mean)


def test_a_single_group_has_a_mean_but_says_nothing_about_correlation():
    stats = length_statistics([[3, 5]], 512)
    assert (stats.mean, stats.limit_over_mean) == (4.0, 128.0)
    assert math.isnan(stats.group_correlation)


@pytest.mark.parametrize("lengths", [[[3], [4]], [], np.array([3, 4])])
def test_length_statistics_refuse_what_is_no_group(lengths):
    with pytest.raises(ValueError, match="groups of at least 2 lengths"):
        length_statistics(lengths, 512)
