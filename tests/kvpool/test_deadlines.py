"""What keeps callers from waiting for a server: calls with a deadline, and the circuit breaker."""

import threading
import time

import pytest

from seer_jax.kvpool.breaker import CircuitBreaker
from seer_jax.kvpool.lanes import Lanes


def test_a_call_returns_what_the_function_returns_or_raises():
    lanes = Lanes(1, 8)
    with lanes.take(1.0) as lane:
        assert lane.call(max, 3, 5) == 5
        with pytest.raises(ZeroDivisionError):
            lane.call(divmod, 1, 0)
    with lanes.take(1.0) as lane:
        assert lane.call(threading.current_thread).name == "kvpool-lane-0"
    assert lanes.close(1.0)


def test_all_calls_on_a_lane_share_its_deadline():
    lanes = Lanes(1, 8)
    started = time.monotonic()
    with pytest.raises(TimeoutError), lanes.take(0.2) as lane:
        for _ in range(100):
            lane.call(time.sleep, 0.05)
    assert 0.2 <= time.monotonic() - started < 1.0


def test_a_call_that_overran_keeps_its_buffer_until_it_has_ended():
    lanes, may_end = Lanes(2, 8), threading.Event()
    with pytest.raises(TimeoutError), lanes.take(0.05) as late:
        late.call(may_end.wait)
    for _ in range(3):
        with lanes.take(1.0) as lane:
            assert lane.buffer is not late.buffer
    with lanes.take(1.0), pytest.raises(TimeoutError, match="no lane"), lanes.take(0.05):
        pass
    assert not lanes.close(0.05)
    may_end.set()
    with lanes.take(1.0) as lane:
        assert lane.buffer is late.buffer


def make_breaker():
    now = [0.0]
    return CircuitBreaker(first_wait_s=1.0, longest_wait_s=3.0, clock=lambda: now[0]), now


def test_a_closed_breaker_asks_for_no_probe():
    breaker, now = make_breaker()
    now[0] = 1e9
    assert not breaker.is_open
    assert not breaker.begin_probe()


def test_an_open_breaker_waits_longer_after_every_probe_that_failed_up_to_its_limit():
    breaker, now = make_breaker()
    breaker.trip()
    for wait_s in (1.0, 2.0, 3.0, 3.0):
        now[0] += wait_s - 0.01
        assert not breaker.begin_probe()
        now[0] += 0.01
        breaker.trip()
        assert [breaker.begin_probe(), breaker.begin_probe()] == [True, False]
        breaker.end_probe(succeeded=False)
        assert breaker.is_open


def test_a_probe_that_succeeds_closes_it_and_the_next_failure_starts_anew():
    breaker, now = make_breaker()
    for _ in range(2):
        breaker.trip()
        for wait_s, succeeded in ((1.0, False), (2.0, True)):
            now[0] += wait_s
            assert breaker.begin_probe()
            breaker.end_probe(succeeded=succeeded)
        assert not breaker.is_open
        assert not breaker.begin_probe()
