"""Calls that may not come back: each runs on a thread of its own, and its caller waits no longer than a deadline."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np


class Lane:
    """A thread and a buffer, taken for some calls that share a deadline.

    A call that overran still runs. It may read and write the lane's buffer, but no memory of the caller's: so calls
    must be given nothing but the buffer, and the lane is taken by nobody before the call has ended.

    Attributes:
        buffer: Scratch memory, [buffer_bytes] uint8.
    """

    def __init__(self, calls: queue.SimpleQueue, buffer: np.ndarray) -> None:
        """See `Lanes.take`."""
        self.buffer = buffer
        self.deadline = 0.0
        self.last: Future | None = None
        self._calls = calls

    def call(self, function: Callable, *args: object) -> Any:
        """Run a function on the thread and return what it returns.

        Raises:
            TimeoutError: If it has not returned at the deadline.
        """
        self.last = Future()
        self._calls.put((self.last, function, args))
        return self.last.result(max(0.0, self.deadline - time.monotonic()))


class Lanes:
    """A fixed number of lanes; threads take them in turn."""

    def __init__(self, count: int, buffer_bytes: int) -> None:
        """Start `count` threads with a buffer each."""
        self._free: queue.LifoQueue[tuple[queue.SimpleQueue, np.ndarray]] = queue.LifoQueue()
        self.buffers = [np.empty(buffer_bytes, np.uint8) for _ in range(count)]
        for index, buffer in enumerate(self.buffers):
            calls: queue.SimpleQueue = queue.SimpleQueue()
            # Daemons: a call that never ends must not keep the process.
            threading.Thread(target=_serve, args=(calls,), name=f"kvpool-lane-{index}", daemon=True).start()
            self._free.put((calls, buffer))

    @contextmanager
    def take(self, timeout_s: float) -> Iterator[Lane]:
        """Have a lane to oneself; everything called on it has to end within `timeout_s` from now.

        Raises:
            TimeoutError: If no lane gets free in time.
        """
        deadline = time.monotonic() + timeout_s
        try:
            calls, buffer = self._free.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no lane got free in {timeout_s} s") from None
        lane = Lane(calls, buffer)
        lane.deadline = deadline
        try:
            yield lane
        finally:
            if lane.last is None:
                self._free.put((calls, buffer))
            else:
                lane.last.add_done_callback(lambda _: self._free.put((calls, buffer)))

    def close(self, timeout_s: float) -> bool:
        """End the threads; False if some call still ran after `timeout_s`, whose thread is then left to itself."""
        deadline = time.monotonic() + timeout_s
        for _ in self.buffers:
            try:
                calls, _ = self._free.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return False
            calls.put(None)
        return True


def _serve(calls: queue.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        future, function, args = call
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
