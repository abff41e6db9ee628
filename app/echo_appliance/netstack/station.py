"""Builds a host from what the command line says: device, addresses, TCP, all driven by a loop."""

import os
import sys

from ..errors import ParseError, SetupError
from ..inherit import Inherited, take_apart
from ..options import ArgumentError, Parser, positive, seconds
from .addresses import format_ip, parse_network, parse_unicast
from .counts import Counts
from .device import Device, adopt, check_mtu, do_in_software, open_packet, open_tap
from .driver import Driver
from .interface import Interface
from .routes import Routes
from .tcp.settings import Settings
from .wire import ethernet, ipv6

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from ..loop import Loop
    from .addresses import Network
    from .tcp.connection import Connection
    from .tcp.states import State

    T = TypeVar("T")

ADDRESSES_LIMIT = 64
CLAIM_SECONDS = 0.2
MEMORY_KEPT = 1 << 20  # octets: as much as one direction of a connection holds

_PROBES = 3  # RFC 5227 section 1.1, PROBE_NUM
_SECRET_SIZE = 32


class Options:
    """What every verb understands; filled by the parser."""

    device: str | None
    address: "list[Network] | None"
    gateway: "list[bytes] | None"
    tap: str | None
    mac: bytes | None
    mtu: int | None
    software: bool
    claim: float
    pcap: str | None
    trace: bool


def add_options(parser: Parser) -> None:
    """Add what every verb understands."""
    parser.group("the link")
    parser.add(
        "--device", metavar="DEV",
        help="fd:NAME (a descriptor that was passed), tap:IFNAME or packet:IFNAME",
    )  # fmt: skip
    parser.add(
        "--address", Several(read(parse_network)), metavar="A/P",
        help="our address and its link's prefix length; any number, IPv4 and IPv6",
    )  # fmt: skip
    parser.add(
        "--gateway", Several(read(parse_unicast)), metavar="A",
        help="who takes what is not for the link; one per version",
    )  # fmt: skip
    parser.add(
        "--tap", metavar="IFNAME",
        help="the tap that a descriptor of /dev/net/tun is to be attached to",
    )  # fmt: skip
    parser.add(
        "--mac", read(ethernet.parse_address), metavar="MAC",
        help="our hardware address (default: the interface's, or one made of the first --address)",
    )  # fmt: skip
    parser.add(
        "--mtu", positive, metavar="N",
        help="largest packet (default: the interface's, 1500 where that cannot be seen)",
    )  # fmt: skip
    parser.add(
        "--claim", seconds, default=CLAIM_SECONDS, metavar="S",
        help="ask the link for S seconds whether an address is taken (default: 0.2; 0: do not ask)",
    )  # fmt: skip
    parser.add(
        "--software", default=False,
        help="cut segments and fill in checksums ourselves, where the tap could",
    )  # fmt: skip
    parser.group("to see what happens")
    parser.add("--pcap", metavar="FILE", help="write all frames to FILE, for tcpdump and Wireshark")
    parser.add("--trace", default=False, help="show TCP's states as they change")


def read(parse: "Callable[[str], T]") -> "Callable[[str], T]":
    """Return a parser of ours as one that the command line's complaints understand."""

    def parse_argument(text: str) -> "T":
        try:
            return parse(text)
        except ParseError as error:
            raise ArgumentError(str(error)) from None

    return parse_argument


class Several:
    """Reads an option that may be given several times, into a list."""

    def __init__(self, parse: "Callable[[str], object]") -> None:
        self._parse = parse
        self._values: list[object] = []

    def __call__(self, text: str) -> list[object]:
        if len(self._values) >= ADDRESSES_LIMIT:
            raise ArgumentError(f"more than {ADDRESSES_LIMIT} of them")
        self._values.append(self._parse(text))
        return self._values


class Station:
    """A host on a link, ready to be driven."""

    def __init__(self, loop: "Loop", options: Options, lost: "Callable[[str], None]") -> None:
        """lost(why) is called when the device gives no more frames.  Raises SetupError."""
        self.loop = loop
        self._options = options
        _keep_memory()
        networks = options.address or []
        if not networks:
            raise SetupError("no --address: give our own, as in --address 192.0.2.2/24")
        self.device, self.sockets = open_device(options, [one.address for one in networks])
        self.counts = Counts(self.device)
        hardware = options.mac or self.device.hardware or _make_hardware(networks[0].address)
        gateways = options.gateway or []
        _check_addresses(networks, gateways, self.device.mtu)
        self.interface = Interface(
            self.device, hardware, networks, gateways, self.counts, os.urandom(_SECRET_SIZE),
            Settings(nagle=False),
        )  # fmt: skip
        self.endpoint = self.interface.streams.endpoint
        self.counts.of_tcp = self.endpoint.counters
        self.driver = Driver(loop, self.device, self.interface, lost)
        self._capture(options.pcap)
        if options.trace:
            self.endpoint.on_transition = _trace

    def start(self, ready: "Callable[[], None]", failed: "Callable[[SetupError], None]") -> None:
        """Drive the interface; call ready() once the link has not objected to our addresses."""
        self.driver.start()
        link = self.interface.link
        defend = link.on_conflict

        def on_conflict(address: bytes, hardware: bytes, _now: float) -> None:
            timer.cancel()
            link.on_conflict = defend
            who = ethernet.format_address(hardware)
            failed(SetupError(
                f"{format_ip(address)} is in use on the link, by {who}: take another --address"
            ))  # fmt: skip

        def claimed() -> None:
            link.on_conflict = defend
            link.tentative = False
            link.announce()
            ready()

        if not self._options.claim:
            claimed()
            return
        link.tentative = True
        link.on_conflict = on_conflict
        timer = self.loop.call_later(self._options.claim, claimed)
        for number in range(_PROBES):
            self.loop.call_later(self._options.claim * number / _PROBES, link.probe)

    def check_peer(self, address: bytes) -> None:
        """Raise SetupError where no other host has this address."""
        _check_other(address, self._options.address or [])

    def close(self) -> None:
        """Leave the link."""
        self.driver.close()

    def _capture(self, path: str | None) -> None:
        if path is None:
            return
        from .pcap import open_capture

        capture = open_capture(path)
        give_back = self.device.on_close

        def close() -> None:
            capture.close()
            if give_back is not None:
                give_back()

        self.device.on_frame = capture.add
        self.device.on_close = close


def _keep_memory() -> None:
    """Have malloc keep what is freed for what comes next, up to a bound.

    glibc gives what exceeds 128 KiB back to the kernel: two segments.  To have it anew costs a page
    fault per 4 KiB, which was half of the CPU time of a bulk transfer (512 MiB sent: 0.44 s, and
    0.21 without).  Once a larger block that was mapped is freed, twice its size is kept:
    mallopt(3), M_MMAP_THRESHOLD.  Other C libraries do as they do.
    """
    bytes(MEMORY_KEPT)


def open_device(options: Options, addresses: "Sequence[bytes]") -> tuple[Device, list[Inherited]]:
    """Return the device that --device names, and the other sockets that were passed to us.

    Raises SetupError.
    """
    kind, colon, name = (options.device or "").partition(":")
    if not colon or not name or kind not in ("fd", "tap", "packet"):
        given = f"{options.device!r} is none: " if options.device else ""
        raise SetupError(f"--device: {given}give fd:NAME, tap:IFNAME or packet:IFNAME")
    if options.tap is not None and kind != "fd":
        raise SetupError("--tap is for a descriptor (fd:NAME) of /dev/net/tun: drop it")
    raw, sockets = take_apart(name if kind == "fd" else "")
    if kind == "fd":
        device = _adopt_only(raw, name, options.tap)
    elif kind == "tap":
        device = open_tap(name)
    else:
        from .keeper import keep_away

        device = open_packet(name)
        device.on_close = keep_away(name, addresses)
    if options.software:
        do_in_software(device)
    _set_mtu(device, options.mtu, addresses)
    return device, sockets


def _adopt_only(raw: list[int], name: str, tap: str | None) -> Device:
    if not raw:
        raise SetupError(
            f"no descriptor named {name!r} was passed: OpenFile=/dev/net/tun:{name} in the unit, "
            "or systemd-socket-activate --fdname="
        )
    if len(raw) > 1:
        raise SetupError(f"{len(raw)} descriptors are named {name!r}: pass one")
    return adopt(raw[0], name, tap)


def _set_mtu(device: Device, mtu: int | None, addresses: "Sequence[bytes]") -> None:
    if mtu is not None:
        least = ipv6.MINIMUM_MTU if any(len(one) == 16 for one in addresses) else 68
        device.mtu = check_mtu(mtu, least)
    if device.mtu < ipv6.MINIMUM_MTU and any(len(one) == 16 for one in addresses):
        raise SetupError(f"an MTU of {device.mtu} carries no IPv6: 1280 octets at the least")


def _check_other(address: bytes, networks: "Sequence[Network]") -> None:
    if any(address == network.address for network in networks):
        raise SetupError(f"{format_ip(address)} is our own address: give another host's")
    if any(address == network.broadcast for network in networks):
        raise SetupError(f"{format_ip(address)} is its link's broadcast address: give one host's")


def _check_addresses(networks: "Sequence[Network]", gateways: "Sequence[bytes]", mtu: int) -> None:
    addresses = [network.address for network in networks]
    if len(set(addresses)) < len(addresses):
        raise SetupError("an --address is given twice: drop one")
    if len({len(gateway) for gateway in gateways}) < len(gateways):
        raise SetupError("more than one --gateway: give one per version")
    near = Routes(networks, [], mtu)
    for gateway in gateways:
        _check_other(gateway, networks)
        if near.next_hop(gateway) is None:
            raise SetupError(
                f"--gateway {format_ip(gateway)} is on the link of no --address: "
                "give the one of our own link"
            )


def _make_hardware(address: bytes) -> bytes:
    """Return an address of our own making, the same each time: neighbours need not learn anew.

    The first octet says that it is nobody's product (locally administered).
    """
    return b"\x02\x00" + address[-4:]


def _trace(_connection: "Connection", _old: "State", new: "State") -> None:
    try:
        sys.stderr.write(f"[{new.value}]\n")
    except (OSError, AttributeError):  # nobody reads it any more, or ever did
        pass
