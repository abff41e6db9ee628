"""Whatever way a stream is cut up on its way in and out, the octets are the same."""

import select
import socket

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_stream import World

Chunks = st.lists(st.binary(min_size=1, max_size=400), max_size=40)
Rooms = st.lists(st.integers(0, 300), max_size=80)


@given(Chunks, Rooms)
def test_stream_any_chunking_comes_back_whole_and_in_order(
    chunks: list[bytes], rooms: list[int]
) -> None:
    world = World()
    world.socket.incoming = [*chunks]
    rooms = [*rooms]
    for _ in range(len(chunks) + len(rooms) + 1):
        if rooms:
            world.socket.room = [room] if (room := rooms.pop()) else []
        else:
            world.socket.room = [10_000]
        world.event()
        assert world.connection.unsent <= 400, "one read is all that ever waits"
        waiting = world.loop.watched[world.socket.fileno()]
        assert waiting == (select.EPOLLOUT if world.connection.unsent else select.EPOLLIN)
    assert bytes(world.socket.sent) == b"".join(chunks)
    assert world.counters.received == world.counters.sent == len(world.socket.sent)


@given(Chunks, Rooms, st.integers(0, 60))
def test_stream_ended_at_any_moment_leaves_nothing_behind(
    chunks: list[bytes], rooms: list[int], moment: int
) -> None:
    world = World()
    world.socket.incoming = [*chunks]
    for turn in range(moment):
        world.socket.room = [rooms[turn]] if turn < len(rooms) and rooms[turn] else []
        world.event()
    cut_short = world.connection.unsent > 0
    world.connection.abort("drain-timeout")
    world.assert_gone()
    assert ([option[1] for option in world.socket.options] == [socket.SO_LINGER]) == cut_short
    assert b"".join(chunks).startswith(bytes(world.socket.sent))
