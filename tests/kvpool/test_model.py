"""The embedded pool against a dictionary: any order of calls, pools opened again in between."""

import shutil
import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from seer_jax.kvpool import EmbeddedKVPool, Status
from tests.kvpool.blocks import get, make_key, put

NAMES = st.lists(st.integers(0, 23), min_size=1, max_size=6)
SIZES = (8192, 3000, 20_000)


class PoolMachine(RuleBasedStateMachine):
    """`names` are all ever put, `gone` those dropped since."""

    @initialize(disk=st.booleans())
    def open(self, disk):
        self.path = tempfile.mkdtemp() if disk else None
        self.names, self.gone = set(), set()
        self._open()

    def _open(self):
        options = {"directory": self.path, "max_disk_bytes": 400_000, "segment_bytes": 40_000} if self.path else {}
        self.pool = EmbeddedKVPool(64 << 10, **options)

    def teardown(self):
        self.pool.close()
        if self.path:
            shutil.rmtree(self.path)

    @rule(names=NAMES, epoch=st.integers(0, 2), priority=st.sampled_from([0.0, 1.0]))
    def put(self, names, epoch, priority):
        for name in names:
            (status,) = put(self.pool, [name], SIZES[name % 3], epoch, priority)
            assert status in (Status.STORED, Status.NO_SPACE)
            if status is Status.STORED:
                self.names.add((name, epoch))
                self.gone.discard((name, epoch))

    @rule(names=NAMES, epoch=st.integers(0, 2))
    def get(self, names, epoch):
        for name in names:
            (status,) = get(self.pool, [name], SIZES[name % 3], epoch)
            assert status in (Status.HIT, Status.MISS)
            assert status is Status.MISS or (name, epoch) in self.names - self.gone

    @rule(names=NAMES, epoch=st.integers(0, 2))
    def drop(self, names, epoch):
        self.pool.drop([make_key(name, epoch) for name in names])
        self.gone |= {(name, epoch) for name in names}

    @rule(epoch=st.integers(0, 2))
    def drop_epochs(self, epoch):
        self.pool.drop_epochs_before(epoch)
        self.gone |= {(name, old) for name, old in self.names if old < epoch}

    @rule()
    def open_again(self):
        if self.path is None:
            return
        flushed = self.pool.flush()
        held = [each for each in self.names if self.pool.contains([make_key(*each)])[0]]
        self.pool.close()
        self._open()
        self.gone.clear()  # A dropped block may be back: its bytes are right, whoever asks for it.
        if flushed:
            assert all(self.pool.contains([make_key(*each) for each in held]))

    @invariant()
    def bounds_are_kept(self):
        stats = self.pool.stats()
        assert 0 <= stats.dram_bytes <= stats.max_dram_bytes
        assert 0 <= stats.disk_bytes <= stats.max_disk_bytes
        assert stats.num_corrupt == stats.num_disk_errors == stats.num_timeouts == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
