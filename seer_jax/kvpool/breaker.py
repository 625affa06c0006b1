"""When a server that did not answer is asked again."""

import math
import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Open after a failure, until a probe succeeds; waits longer after every probe that fails.

    Closed, calls go to the server. Open, nobody asks it but one probe at a time.
    """

    def __init__(
        self, *, first_wait_s: float, longest_wait_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start closed.

        Args:
            first_wait_s: From a failure to the first probe; doubled with every probe that fails.
            longest_wait_s: Never wait longer.
            clock: Seconds.
        """
        self._first_wait_s, self._longest_wait_s, self._clock = first_wait_s, longest_wait_s, clock
        self._lock = threading.Lock()
        self._wait_s = first_wait_s
        self._probe_at = math.inf
        self.is_open = False

    def trip(self) -> None:
        """A call failed: open. Failures of calls that were still on their way change nothing."""
        with self._lock:
            if not self.is_open:
                self.is_open = True
                self._wait_s = self._first_wait_s
                self._probe_at = self._clock() + self._wait_s

    def begin_probe(self) -> bool:
        """Whether the caller has to probe now and report to `end_probe`; one caller at a time is told so."""
        with self._lock:
            if self._clock() < self._probe_at:
                return False
            self._probe_at = math.inf
            return True

    def end_probe(self, succeeded: bool) -> None:
        """Close, or wait twice as long as before."""
        with self._lock:
            self.is_open = not succeeded
            if not succeeded:
                self._wait_s = min(2 * self._wait_s, self._longest_wait_s)
                self._probe_at = self._clock() + self._wait_s
