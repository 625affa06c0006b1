"""What the embedded pool holds and where: one lock over the books, none over bytes."""

import threading
from collections import Counter

from seer_jax.kvpool.arena import Arena, Slot, slot_bytes
from seer_jax.kvpool.blocks import BlockHeader
from seer_jax.kvpool.eviction import Ranks, VictimQueue
from seer_jax.kvpool.keys import BlockKey
from seer_jax.kvpool.segments import Place, SegmentFiles


class Entry:
    """A block: being copied in (no header yet), in DRAM (`slot`), on disk (`place`), or in both."""

    __slots__ = ("dirty_bytes", "gone", "header", "key", "place", "slot", "spilling", "stuck")

    def __init__(self, key: BlockKey) -> None:
        self.key = key
        self.header: BlockHeader | None = None
        self.slot: Slot | None = None
        self.place: Place | None = None
        self.gone = self.spilling = self.stuck = False
        self.dirty_bytes = 0


class Index:
    """Books of the pool. Every method, and every field but `changed`, is used under `changed`'s lock.

    Attributes:
        changed: Notified whenever memory, files or a block become available.
        dirty: Blocks in DRAM only, which can be spilled or, without a disk, evicted.
        clean: Blocks in DRAM and on disk, whose memory is free for the taking.
        on_disk: Blocks on disk.
        refused: Blocks in DRAM that the disk would not take.
        can_spill: Whether there is a disk, and a thread that writes to it.
        dirty_bytes: Memory of blocks in DRAM only.
        pending_bytes: Memory that is free as soon as its last reader is done.
        num_blocks: Blocks that can be had.
        num_filling: Blocks being copied in.
        num_spilling: Blocks being written to disk.
        counts: Counters of `PoolStats`.
    """

    def __init__(self, arena: Arena, files: SegmentFiles | None) -> None:
        self.changed = threading.Condition()
        self.arena, self.files = arena, files
        self.entries: dict[bytes, Entry] = {}
        self.ranks = Ranks()
        self.dirty, self.clean, self.on_disk, self.refused = (VictimQueue(self.ranks) for _ in range(4))
        self.can_spill = files is not None
        self.dirty_bytes = self.pending_bytes = self.num_blocks = self.num_filling = self.num_spilling = 0
        self.counts: Counter[str] = Counter()
        self.closed = False

    def complete(self, entry: Entry, header: BlockHeader) -> None:
        """A block is all there and can be had."""
        entry.header = header
        self.num_blocks += 1
        self.requeue(entry)

    def requeue(self, entry: Entry) -> None:
        """Put an entry into the queues it belongs to, after any change of it."""
        digest = entry.key.digest
        if self.entries.get(digest) is not entry:
            return  # Another block may have the name by now.
        ready = entry.header is not None and not entry.gone
        in_dram, is_on_disk = ready and entry.slot is not None, ready and entry.place is not None
        is_dirty = in_dram and not is_on_disk
        dirty_bytes = entry.slot.size_bytes if is_dirty else 0
        self.dirty_bytes += dirty_bytes - entry.dirty_bytes
        entry.dirty_bytes = dirty_bytes
        for queue, belongs in (
            (self.dirty, is_dirty and not entry.spilling and not entry.stuck),
            (self.clean, in_dram and is_on_disk),
            (self.on_disk, is_on_disk),
            (self.refused, is_dirty and entry.stuck),
        ):
            if belongs:
                queue.add(digest)
            else:
                queue.discard(digest)

    def remove(self, entry: Entry) -> None:
        """Forget a block, wherever it is; readers that are at it may finish."""
        if entry.gone:
            return
        entry.gone = True
        self.num_blocks -= entry.header is not None
        self.requeue(entry)
        digest = entry.key.digest
        del self.entries[digest]
        self.ranks.forget(digest)
        if entry.slot is not None:
            self.release_slot(entry)
        if entry.place is not None:
            self.files.kill(entry.place)
        self.changed.notify_all()

    def release_slot(self, entry: Entry) -> None:
        """Give a block's memory back, now or when its last user is done."""
        slot, entry.slot = entry.slot, None
        if slot.users:
            slot.released = True
            self.pending_bytes += slot.size_bytes
        elif not self.closed:
            self.arena.free(slot)
        self.requeue(entry)

    def leave_slot(self, slot: Slot) -> None:
        """One user less."""
        slot.users -= 1
        if slot.released and not slot.users:
            self.pending_bytes -= slot.size_bytes
            if not self.closed:
                self.arena.free(slot)
            self.changed.notify_all()

    def take_memory(self, payload_bytes: int, priority: float) -> Slot | None:
        """Allocate, at the expense of clean blocks, then of those worth no more that no disk takes; None = not now."""
        while (slot := self.arena.allocate(payload_bytes)) is None:
            if self.pending_bytes and self.arena.free_bytes + self.pending_bytes >= slot_bytes(payload_bytes):
                return None
            digest = self.clean.peek()
            if digest is not None:
                self.release_slot(self.entries[digest])
                continue
            digest = (self.refused if self.can_spill else self.dirty).peek()
            if digest is None or self.ranks[digest][0] > priority:
                return None
            self.remove(self.entries[digest])
            self.counts["num_evicted"] += 1
        return slot

    def may_get_memory(self) -> bool:
        """Whether waiting can help a put that found no memory."""
        will_spill = self.can_spill and (len(self.dirty) or self.num_spilling)
        return bool(self.pending_bytes or self.num_filling or will_spill)

    def unstick(self) -> None:
        """Let everything that the disk refused be tried again."""
        for entry in self.entries.values():
            if entry.stuck:
                entry.stuck = False
                self.requeue(entry)

    def unstick_one(self) -> Entry | None:
        """Let the least valuable block that the disk refused be tried again; None if there is none."""
        digest = self.refused.peek()
        if digest is None:
            return None
        entry = self.entries[digest]
        entry.stuck = False
        self.requeue(entry)
        return entry

    def stop_spilling(self) -> None:
        """The thread that writes has ended: go on with DRAM and what is on disk already."""
        self.can_spill = False
        for entry in self.entries.values():
            entry.stuck = False
            self.requeue(entry)
        self.changed.notify_all()

    def clear(self) -> None:
        """Forget everything; blocks in use go with their last user."""
        for entry in self.entries.values():
            entry.gone = True
        self.entries.clear()
        self.num_blocks = 0
        self.ranks = Ranks()
        self.dirty, self.clean, self.on_disk, self.refused = (VictimQueue(self.ranks) for _ in range(4))
        self.dirty_bytes = 0
        self.arena = Arena(0)
