"""Echoes datagrams: each whole, from the address it was sent to, to where it came from.

An answer that cannot be sent now is dropped and counted, as UDP does: nothing
waits for a datagram, so nothing can be made to.

UDP has no handshake, so its sources can be forged.  Two servers that answer
anything can be set upon each other for ever by one forged datagram
(CVE-1999-0103, CVE-2024-2169); hence REFUSED_PORTS.
"""

import os
import select
import socket

from ..answers import ask_for_destination, let_answers_be_long, send_reason
from ..buffer import VIEW
from ..errors import say
from ..inherit import Inherited
from ..original import ANCILLARY_SIZE, answer_from, answer_to, destination, local_address
from .connection import Endpoint
from .replies import Replies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..lending import Address
    from ..original import Ancillary

    Refused = frozenset[object]

# Give way to the connections after so many; a queue that is longer is reported again.
DATAGRAMS_PER_TURN = 64

# Destinations whose control messages are kept ready.  Behind a prefix there may be millions.
_ANSWERS_KEPT = 1024

# Services that answer whatever reaches them: no client of ours uses these as its port.
REFUSED_PORTS = frozenset((
    0,  # nobody can be answered there
    7, 11, 13, 17, 19,  # echo, active users, daytime, quote of the day, character generator
    37, 53, 69, 111, 123,  # time, DNS, TFTP, portmapper, NTP
    137, 161, 389, 500, 520,  # NetBIOS names, SNMP, CLDAP, IKE, RIP
    1434, 1900, 3702,  # MS-SQL, SSDP, WS-Discovery
    5060, 5353, 5683, 11211,  # SIP, multicast DNS, CoAP, memcached
))  # fmt: skip

_buffers = [VIEW]


class _Datagrams:
    """One inherited datagram socket.  Owns it; close() ends it."""

    def __init__(self, endpoint: Endpoint, inherited: Inherited) -> None:
        self._endpoint = endpoint
        self._socket = inherited.socket
        self._where = str(inherited)

    def start(self) -> None:
        """Echo from now on."""
        # Exclusive: of several workers that wait for this socket one is woken, not all.
        events = select.EPOLLIN | select.EPOLLEXCLUSIVE
        self._endpoint.loop.watch(self._socket.fileno(), events, self._on_event)

    def close(self) -> None:
        """Stop.  What is queued stays there for whoever holds the socket."""
        self._endpoint.loop.discard(self._socket.fileno())
        self._socket.close()

    def look_again(self) -> None:
        """Nothing to do: nobody pauses in the middle of a queue."""

    def _on_event(self, events: int) -> None:
        if events & select.EPOLLHUP:
            # It stays readable for ever, with nothing to read.
            self._endpoint.loop.forget(self._socket.fileno())
            say(f"{self._where}: shut down by somebody who holds it too; not served any more")
            self._endpoint.service.source_lost()
        else:
            self._on_readable()

    def _on_readable(self) -> None:
        raise NotImplementedError


class InternetDatagrams(_Datagrams):
    """Echoes on a UDP socket, IPv4, IPv6 or both."""

    def __init__(
        self,
        endpoint: Endpoint,
        inherited: Inherited,
        refused: frozenset[int],
        lender: socket.socket | None,
    ) -> None:
        super().__init__(endpoint, inherited)
        self._refused = refused
        self._answers: dict[bytes, Ancillary | None] = {}
        self._port = inherited.socket.getsockname()[1]
        self._replies = Replies(endpoint, inherited.socket, lender)
        ask_for_destination(inherited)

    def close(self) -> None:
        """Stop, and end the flows to other ports than ours."""
        self._replies.close()
        super().close()

    # Hot: local names; the control messages of an answer are made once per destination.
    # 0.74 of the same loop in C.
    def _on_readable(self) -> None:
        receive = self._socket.recvmsg_into
        send = self._socket.sendmsg
        answers = self._answers
        refused = self._refused
        endpoint = self._endpoint
        counters = endpoint.counters
        endpoint.service.touch()
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                size, ancillary, _, peer = receive(_buffers, ANCILLARY_SIZE)
            except BlockingIOError:
                return
            except OSError:
                counters.drop("receive-error")  # an ICMP error for an earlier answer
                continue
            counters.datagrams_received += 1
            counters.received += size
            if peer[1] in refused:
                counters.drop("refused-port")
                continue
            try:
                ((_, _, sent_to),) = ancillary  # what we asked for, and nothing else
            except ValueError:
                sent_to = destination(ancillary)
            try:
                answer = answers[sent_to]
            except KeyError:
                answer = self._remember(sent_to, ancillary)
            if answer is None:
                answer = self._answer_elsewhere(sent_to, peer, size)
                if answer is None:
                    continue
            try:
                send((VIEW[:size],), answer, 0, peer)
            except OSError as error:
                counters.drop(send_reason(error))
                continue
            counters.datagrams_sent += 1
            counters.sent += size
            if endpoint.debug:
                endpoint.trace(size, size)

    def _remember(self, sent_to: bytes, ancillary: "Ancillary") -> "Ancillary | None":
        if len(self._answers) >= _ANSWERS_KEPT:
            self._answers.clear()
        answer = answer_from(ancillary)
        local = local_address(sent_to)
        if local is not None and local[1] != self._port:
            answer = None  # not by control messages: see _answer_elsewhere()
        self._answers[sent_to] = answer
        return answer

    def _answer_elsewhere(self, sent_to: bytes, peer: "Address", size: int) -> "Ancillary | None":
        """Answer from another port than ours, for dispatch; or not at all, for a group.

        Returns None when that is done, else how to answer from here after all.
        """
        counters = self._endpoint.counters
        local = local_address(sent_to)
        if local is None:
            counters.drop("sent-to-group")
            return None
        if len(local) == 2:
            # By a dual-stack socket an IPv4 client has an IPv6 name.
            peer = (peer[0].removeprefix("::ffff:"), peer[1])
        if self._replies.is_own(local, peer):
            counters.drop("own-answer")
            return None
        return None if self._replies.answer(local, peer, size) else answer_to(sent_to)


class UnixDatagrams(_Datagrams):
    """Echoes on a unix datagram socket.

    A client is answered wherever its address can be reached: an abstract (or
    autobound) one belongs to the network namespace of the socket, which is the
    host's; a path must be visible, and writable, in our mount namespace.  A
    connected socket has one peer, which needs no address.
    """

    def __init__(self, endpoint: Endpoint, inherited: Inherited, refused: "Refused") -> None:
        super().__init__(endpoint, inherited)
        self._connected = inherited.connected
        self._refused = refused
        let_answers_be_long(inherited.socket)

    def _on_readable(self) -> None:
        self._endpoint.service.touch()
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                size, _, flags, peer = self._socket.recvmsg_into(_buffers)
            except BlockingIOError:
                return
            except OSError:
                self._endpoint.counters.drop("receive-error")
                continue
            self._echo(size, flags, peer)

    def _echo(self, size: int, flags: int, peer: "str | bytes | None") -> None:
        counters = self._endpoint.counters
        counters.datagrams_received += 1
        counters.received += size
        if flags & socket.MSG_TRUNC:
            counters.drop("too-long")
            return
        if not (peer or self._connected):
            counters.drop("client-without-address")
            return
        if peer and _identity(peer) in self._refused:
            counters.drop("refused-address")
            return
        try:
            self._socket.sendmsg((VIEW[:size],), (), 0, peer or None)
        except OSError as error:
            counters.drop(send_reason(error))
            return
        counters.datagrams_sent += 1
        counters.sent += size
        if self._endpoint.debug:
            self._endpoint.trace(size, size)


def refused_ports(inherited: "Iterable[Inherited]") -> frozenset[int]:
    """Return the source ports that are not answered: REFUSED_PORTS and our own.

    A datagram from a port that we serve ourselves comes from this process or
    from another one like it, and either would answer our answer, for ever.
    """
    return REFUSED_PORTS.union(
        one.socket.getsockname()[1] for one in inherited if one.is_dgram and one.is_internet
    )


def refused_addresses(inherited: "Iterable[Inherited]") -> "Refused":
    """Return the unix addresses that are not answered: our own, and the service manager's.

    A client's path is a word that is looked up in *our* mount namespace.  In a
    namespace of its own any user can bind to the path that our socket has
    here, and set us upon ourselves for ever, or to that of NOTIFY_SOCKET, and
    have us tell the manager what it likes.
    """
    own = [
        one.socket.getsockname()
        for one in inherited
        if one.is_dgram and one.family == socket.AF_UNIX
    ]
    manager = os.environ.get("NOTIFY_SOCKET", "")
    if manager.startswith("@"):
        own.append(b"\0" + os.fsencode(manager[1:]))
    elif manager:
        own.append(manager)
    return frozenset(_identity(address) for address in own if address)


def _identity(address: "str | bytes") -> object:
    """Return what two spellings of one unix address have in common."""
    if isinstance(address, bytes):
        return address  # abstract: the name itself
    try:
        found = os.stat(address)
    except OSError:
        return address  # not to be reached here: sending will say why
    return (found.st_dev, found.st_ino)
