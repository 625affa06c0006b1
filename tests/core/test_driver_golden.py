"""One tiny iteration by hand: events in, commands out, every number checked."""

from seer_jax.core.commands import EmitSample, IterationDone, StartChunk
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import GroupsSubmitted, InstanceJoined, InstanceLost
from seer_jax.core.scheduling import SeerPolicy
from seer_jax.core.types import RequestId
from tests.core.fake_cluster import finish, make_group, make_info

LENGTHS = {RequestId(0, 0): 3, RequestId(0, 1): 5, RequestId(1, 0): 12, RequestId(1, 1): 9}


def show(commands):
    """Commands as tuples: instance, request, chunk, context, new tokens, pages; or request, length, reason, chunks."""
    lines = []
    for command in commands:
        match command:
            case StartChunk(instance_id=where, chunk=c):
                name, context = "r{}.{}".format(*c.request_id), len(c.token_ids)
                lines.append((where, name, c.chunk_index, context, c.max_chunk_tokens, c.num_reserved_pages))
            case EmitSample(sample=sample):
                name = "r{}.{}".format(*sample.request_id)
                lines.append((name, len(sample.token_ids), sample.finish_reason, sample.num_chunks))
            case IterationDone():
                lines.append("done")
    return lines


def test_two_groups_on_two_instances_one_of_which_dies():
    """Prompt 4, limit 12, chunks of 8, pages of 4; an instance has one slot and 4 pages: exactly one full request."""
    driver = RolloutDriver(SeerPolicy(chunk_size=8, starvation_interval=0, prefetch_chunks=0))
    for number in (0, 1):
        info = make_info(number, num_total_pages=4, max_num_seqs=1)
        assert driver.handle(InstanceJoined(info=info, policy_version=7)) == []
    running = {}

    def handle(event):
        commands = driver.handle(event)
        for command in commands:
            if isinstance(command, StartChunk):
                running[command.chunk.request_id] = (command.instance_id, command.chunk)
        return show(commands)

    def end(group_id, index):
        instance_id, chunk = running.pop(RequestId(group_id, index))
        return handle(finish(instance_id, chunk, LENGTHS[chunk.request_id]))

    # Both probes first, one on each instance: 4 + 8 tokens are 3 pages.
    groups = (make_group(0), make_group(1))
    assert handle(GroupsSubmitted(groups=groups, policy_version=7)) == [
        (0, "r0.0", 0, 4, 8, 3),
        (1, "r1.0", 0, 4, 8, 3),
    ]
    # Probe of group 0 ends with 3 tokens: L_0 = 3, L_1 unknown counts as 12, so group 1 goes first.
    assert end(0, 0) == [("r0.0", 3, "stop", 1), (0, "r1.1", 0, 4, 8, 3)]
    # Probe of group 1 returns after its chunk; a probe goes before everybody. 12 + 4 tokens are 4 pages.
    assert end(1, 0) == [(1, "r1.0", 1, 12, 4, 4)]
    # Instance 0 dies with r1.1, which waits again, and the other instance is full.
    assert handle(InstanceLost(instance_id=0)) == []
    # A replacement joins: L_1 = 12 (unknown) beats L_0 = 3. The lost chunk counts: this one is number 1.
    replacement = make_info(2, num_total_pages=4, max_num_seqs=1)
    assert handle(InstanceJoined(info=replacement, policy_version=7)) == [(2, "r1.1", 1, 4, 8, 3)]
    assert end(1, 0) == [("r1.0", 12, "length", 2), (1, "r0.1", 0, 4, 8, 3)]
    assert end(0, 1) == [("r0.1", 5, "stop", 1)]
    # Back to the instance where it ran: both are empty, ties go to the last one.
    assert end(1, 1) == [(2, "r1.1", 2, 12, 4, 4)]
    assert end(1, 1) == [("r1.1", 9, "stop", 3), "done"]
