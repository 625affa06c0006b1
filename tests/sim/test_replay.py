"""Runs that cannot be replayed say why; what a profile tells is used as it is."""

import json
from pathlib import Path

import pytest

from seer_jax.config.dump import to_yaml
from seer_jax.config.schema import RunConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError, ProtocolError
from seer_jax.core.eventlog import encode_event
from seer_jax.core.latency import MeasuredStepTimes
from seer_jax.core.scheduling import make_estimator, make_policy
from seer_jax.core.types import InstanceInfo, output_sha256
from seer_jax.sim.replay import ProfiledTimes, predict
from tests.core.fake_cluster import FakeCluster, make_group

TIMES = MeasuredStepTimes(
    device="test", model="test", jax="0", contexts=(8, 72), plain_sizes=(1, 4), plain_s=((0.01, 0.02), (0.03, 0.04)),
    verify_sizes=(4, 16), verify_s=((0.05, 0.05), (0.16, 0.16)),
)  # fmt: skip
CONFIG = RunConfig()


def record(run_dir: Path, **changes: object) -> dict:
    """A run of two groups on two instances as `seer-jax rollout` leaves it, from a cluster without engines."""
    groups = [make_group(number, size=3, max_tokens=12) for number in (4, 9)]
    lengths = {(group.group_id, index): 3 + 2 * index for group in groups for index in range(3)}
    infos = [
        InstanceInfo(instance_id=number, num_total_pages=40, page_size=4, max_num_seqs=4, max_model_len=32)
        for number in (0, 1)
    ]
    events = []
    driver = RolloutDriver(make_policy("seer", CONFIG.rollout), make_estimator("seer", CONFIG.rollout))
    cluster = FakeCluster(
        driver=driver, infos=infos, true_lengths=lengths, seed=1, observers=[lambda event, _: events.append(event)]
    )
    samples = cluster.run(groups)
    figures = {
        "kind": "rollout", "policy": "seer", "speculation": "off", "output_sha256": output_sha256(samples),
        "rollout_time_s": 0.3, "tail_time_s": 0.1, "num_preemptions": 0, **changes,
    }  # fmt: skip
    (run_dir / "0-seer").mkdir(parents=True)
    (run_dir / "0-seer" / "events.jsonl").write_text("\n".join(json.dumps(encode_event(event)) for event in events))
    (run_dir / "config.yaml").write_text(to_yaml(CONFIG))
    (run_dir / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    return figures


def test_a_recorded_run_replays_and_is_predicted(tmp_path):
    record(tmp_path)
    (prediction,) = predict(tmp_path, TIMES)
    # Three requests of 3, 5 and 7 tokens on each instance, if they spread evenly: 7 steps of about 30 ms at most.
    assert 7 * 0.01 < prediction.predicted_rollout_time_s < 6 * 7 * 0.04 + 6 * 4 * 0.01 + 0.2
    assert prediction.predicted_preemptions == 0
    row = prediction.to_json()
    assert row["rollout_time_error"] == pytest.approx(prediction.predicted_rollout_time_s / 0.3 - 1)
    assert row["replayed_events"] > 8


def test_prefill_costs_what_tokens_cost_in_the_largest_verification():
    times = ProfiledTimes(TIMES)
    assert times.prefill_s(8) == pytest.approx(8 * 0.01)
    assert times.plain_step_s(3, 8.0) == pytest.approx(0.03)
    assert times.verify_step_s(1, 4, 8.0) == pytest.approx(0.05)


def test_another_output_than_recorded_is_a_broken_protocol(tmp_path):
    record(tmp_path, output_sha256="0" * 64)
    with pytest.raises(ProtocolError, match="recorded is 0000"):
        predict(tmp_path, TIMES)


def test_a_chunk_that_the_driver_would_not_have_sent_is_a_broken_protocol(tmp_path):
    record(tmp_path)
    log = tmp_path / "0-seer" / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    finished = next(line for line in lines if line["type"] == "ChunkFinished")
    finished["instance_id"] = 1 - finished["instance_id"]
    log.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ProtocolError, match="no chunk of"):
        predict(tmp_path, TIMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"speculation": "grouped"}, "ran with speculation grouped"), ({"kind": "train"}, "no finished rollout")],
)
def test_runs_that_cannot_be_predicted(tmp_path, changes, message):
    record(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        predict(tmp_path, TIMES)


def test_runs_that_lost_an_instance_or_were_torn_are_refused(tmp_path):
    record(tmp_path)
    log = tmp_path / "0-seer" / "events.jsonl"
    whole = log.read_text()
    log.write_text(whole + '\n{"type": "InstanceLost", "instance_id": 1}\n')
    with pytest.raises(ConfigError, match="lost an instance"):
        predict(tmp_path, TIMES)
    log.write_text(whole[:-9])
    with pytest.raises(ConfigError, match=r"line \d+ of .*events\.jsonl is no JSON"):
        predict(tmp_path, TIMES)


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        predict(tmp_path, TIMES)
