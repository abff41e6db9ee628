"""The descriptor that frames come from and go to, and what its device does for us.

A tap (attached already, or /dev/net/tun to be attached by us), a macvtap, a
packet socket, or a message socket (for tests, and for whoever else makes
frames).  A tap or packet socket with virtio_net_hdr checks and fills in
checksums and cuts large segments; without it, or where that is refused, all is
done in software.

Source: Documentation/networking/tuntap.rst, packet(7), virtio 1.2 section 5.1.6.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
from array import array

from ..errors import SetupError
from ..linux import (
    ETH_P_ALL,
    IFF_NO_PI,
    IFF_TAP,
    IFF_TUN,
    IFF_VNET_HDR,
    PACKET_IGNORE_OUTGOING,
    PACKET_QDISC_BYPASS,
    PACKET_VNET_HDR,
    SIOCGIFHWADDR,
    SIOCGIFMTU,
    SKF_AD_VLAN_TAG_PRESENT,
    SO_ATTACH_FILTER,
    SOL_PACKET,
    TUN_F_CSUM,
    TUN_F_TSO4,
    TUN_F_TSO6,
    TUNGETIFF,
    TUNSETIFF,
    TUNSETOFFLOAD,
    TUNSETVNETHDRSZ,
)
from .wire import ipv4, tcp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Octets = bytes | bytearray | memoryview

DEFAULT_MTU = 1500
TUN_PATH = "/dev/net/tun"

VNET_SIZE = 10  # struct virtio_net_hdr, without what mergeable buffers add
_VERIFIED = 3  # its flags: the checksum is yet to be filled in, or was seen to be right
# A frame of the largest packet, with all that may stand before it.
BUFFER_SIZE = VNET_SIZE + 18 + 65535 + 40

_IFREQ = struct.Struct("16sH22x")
_TUN_DEVICE = os.makedev(10, 200)  # Documentation/admin-guide/devices.txt
_RECEIVE_BUFFER = 8 << 20


class Device:
    """Where frames are read and written.  Owns the descriptor."""

    def __init__(self, descriptor: int, name: str, mtu: int, *, vnet: bool, offload: bool) -> None:
        self.descriptor = descriptor
        self.name = name
        self.mtu = mtu
        self.hardware: bytes | None = None  # the address that it insists on
        self.checksums = offload
        self.segment_limit = tcp.SUPER_SEGMENT if offload else 0
        self.prefix = bytes(VNET_SIZE) if vnet else b""
        self.lost: dict[str, int] = {}  # frames not sent, by reason
        self.sent_frames = 0
        self.last_sent = 0  # octets of the last frame, prefix and all
        self.received_frames = 0
        self.on_frame: Callable[[Octets], None] | None = None  # sees each frame, both ways
        self.on_close: Callable[[], None] | None = None
        # Frames start at the same place in it, whatever stands before them.
        self._start = VNET_SIZE - len(self.prefix)
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._vector = [self._buffer[self._start :]]
        self._readv = os.readv
        self._writev = os.writev

    def read(self) -> tuple[memoryview, bool] | None:
        """Return a frame, and whether its transport checksum need not be looked at.

        The frame is there until the next call.  None at the end of a message socket, for which
        an empty message is taken, too.  Raises BlockingIOError when there is none, OSError when
        there will be none any more.
        """
        size = self._readv(self.descriptor, self._vector)
        if size <= len(self.prefix):
            return None
        self.received_frames += 1
        verified = self._start == 0 and self._buffer[0] & _VERIFIED != 0
        frame = self._buffer[VNET_SIZE : self._start + size]
        if self.on_frame is not None:
            self.on_frame(frame)
        return frame, verified

    def send(self, head: "Octets", payload: "Octets") -> None:
        """Send a frame, prefix and all, in two parts; what cannot be sent now is lost.

        Its queue may be full, the link down, the frame longer than its MTU: networks lose
        frames, and what is above knows what to do.  A device that is gone fails in read().
        """
        if self.on_frame is not None:
            self.on_frame(b"".join((head[len(self.prefix) :], payload)))
        try:
            self.last_sent = self._writev(self.descriptor, (head, payload))
            self.sent_frames += 1
        except OSError as error:
            reason = f"device-{errno.errorcode.get(error.errno or 0, 'error').lower()}"
            self.lost[reason] = self.lost.get(reason, 0) + 1

    def close(self) -> None:
        """Give the descriptor back, and what on_close() has to."""
        os.close(self.descriptor)
        if self.on_close is not None:
            self.on_close()


# -- taps --------------------------------------------------------------------


def open_tap(name: str) -> Device:
    """Make a tap, or attach to a persistent one.  Raises SetupError."""
    try:
        descriptor = os.open(TUN_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SetupError(
            f"{TUN_PATH} cannot be opened ({error.strerror}): "
            "load the module tun, or be root, or take fd:NAME with OpenFile=/dev/net/tun:NAME"
        ) from error
    attach(descriptor, name)
    device = adopt_tap(descriptor, name)
    device.mtu = interface_mtu(name)
    return device


def attach(descriptor: int, name: str) -> None:
    """Attach /dev/net/tun to a tap by its name.  Raises SetupError; closes nothing."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, _IFREQ.pack(_interface_name(name), flags))
    except OSError as error:
        raise SetupError(f"tap {name} cannot be attached: {_why_not(error)}") from error


def _why_not(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return (
            "that needs CAP_NET_ADMIN, or a persistent tap of your own: "
            "ip tuntap add NAME mode tap user YOU vnet_hdr"
        )
    if error.errno == errno.EBUSY:
        return "somebody else is attached to it: end that process, or take another tap"
    if error.errno == errno.EINVAL:
        return "there is an interface of that name which is not a tap: take another name"
    return str(error.strerror)


def adopt_tap(descriptor: int, name: str) -> Device:
    """Make a Device of a tap's or macvtap's descriptor that is attached.  Raises SetupError."""
    flags = tap_flags(descriptor)
    if flags is None:
        raise SetupError(f"{name} is not attached to a tap: say which one with --tap IFNAME")
    if flags & IFF_TUN:
        raise SetupError(f"{name} is a tun, which has no Ethernet: make a tap (mode tap)")
    if not flags & IFF_NO_PI:
        raise SetupError(f"{name} puts packet information first: make it with IFF_NO_PI")
    os.set_blocking(descriptor, False)
    vnet = bool(flags & IFF_VNET_HDR)
    offload = vnet and _offload_tap(descriptor)
    device = Device(descriptor, name, DEFAULT_MTU, vnet=vnet, offload=offload)
    if os.fstat(descriptor).st_rdev != _TUN_DEVICE:
        device.hardware = _macvtap_address(descriptor)
    return device


def tap_flags(descriptor: int) -> int | None:
    """Return the IFF_ flags of an attached tap; None for what is not attached, or no tap."""
    try:
        answer = fcntl.ioctl(descriptor, TUNGETIFF, bytes(_IFREQ.size))
    except OSError:
        return None
    flags: int = _IFREQ.unpack(answer)[1]
    return flags


def do_in_software(device: Device) -> None:
    """Have a tap leave checksums and segments to us; a packet socket has no such switch."""
    try:
        fcntl.ioctl(device.descriptor, TUNSETOFFLOAD, 0)
    except OSError:
        return
    device.checksums = False
    device.segment_limit = 0


def _offload_tap(descriptor: int) -> bool:
    """Have the tap do checksums and segments; False where that is refused."""
    try:
        fcntl.ioctl(descriptor, TUNSETVNETHDRSZ, struct.pack("=i", VNET_SIZE))
        fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    except OSError:
        return False
    return True


def _macvtap_address(descriptor: int) -> bytes:
    """Return the address that frames for a macvtap go to: it passes on no others."""
    try:
        answer = fcntl.ioctl(descriptor, SIOCGIFHWADDR, bytes(_IFREQ.size))
    except OSError as error:
        raise SetupError(f"a macvtap does not tell its address: {error.strerror}") from error
    return answer[18:24]


# -- packet sockets ----------------------------------------------------------


def open_packet(name: str) -> Device:
    """Open a packet socket on an interface.  Raises SetupError."""
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except PermissionError:
        raise SetupError(
            f"packet:{name} needs CAP_NET_RAW: be root, or take a descriptor (fd:NAME)"
        ) from None
    mtu = interface_mtu(name)
    adopted = adopt_packet(sock, name)
    _leave_vlans_alone(sock)
    sock.bind((name, ETH_P_ALL))
    adopted.hardware = sock.getsockname()[4]
    adopted.mtu = mtu
    sock.detach()
    return adopted


def _leave_vlans_alone(sock: socket.socket) -> None:
    """Have the kernel keep frames with a VLAN tag, which it takes off: they are not of this link.

    Four instructions: is there a tag?  If not, take all octets; else none.  Raises OSError.
    """
    steps = (
        (0x30, 0, 0, SKF_AD_VLAN_TAG_PRESENT),  # ldb
        (0x15, 0, 1, 0),  # jeq #0
        (0x06, 0, 0, 0xFFFFFFFF),  # ret
        (0x06, 0, 0, 0),
    )
    program = array("B", b"".join(struct.pack("=HBBI", *step) for step in steps))
    address, _ = program.buffer_info()
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(steps), address))


def adopt_packet(sock: socket.socket, name: str) -> Device:
    """Make a Device of a packet socket, whose descriptor stays the caller's to detach."""
    sock.setblocking(False)
    vnet = _set(sock, PACKET_VNET_HDR, 1)
    _set(sock, PACKET_IGNORE_OUTGOING, 1)
    _set(sock, PACKET_QDISC_BYPASS, 1)
    _widen(sock)
    device = Device(sock.fileno(), name, DEFAULT_MTU, vnet=vnet, offload=vnet)
    device.hardware = sock.getsockname()[4]
    return device


def _set(sock: socket.socket, option: int, value: int) -> bool:
    try:
        sock.setsockopt(SOL_PACKET, option, value)
    except OSError:
        return False
    return True


def _widen(sock: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _RECEIVE_BUFFER)  # what it may, it gives


# -- descriptors that were passed --------------------------------------------


def adopt(descriptor: int, name: str, tap: str | None) -> Device:
    """Make a Device of a descriptor that was passed to us.  Raises SetupError."""
    os.set_inheritable(descriptor, False)
    kind = os.fstat(descriptor)
    if stat.S_ISSOCK(kind.st_mode):
        return _adopt_socket(descriptor, name)
    if not stat.S_ISCHR(kind.st_mode):
        raise SetupError(f"descriptor {name!r} is neither a tap nor a socket: pass one of these")
    if tap is not None:
        if tap_flags(descriptor) is not None:
            raise SetupError(f"descriptor {name!r} is attached to a tap already: drop --tap")
        attach(descriptor, tap)
    return adopt_tap(descriptor, f"descriptor {name!r}")


def _adopt_socket(descriptor: int, name: str) -> Device:
    sock = socket.socket(fileno=descriptor)
    try:
        if sock.family == socket.AF_PACKET and sock.type == socket.SOCK_RAW:
            return adopt_packet(sock, name)
        if sock.family == socket.AF_UNIX and sock.type != socket.SOCK_STREAM:
            sock.setblocking(False)
            return Device(descriptor, name, DEFAULT_MTU, vnet=False, offload=False)
    finally:
        sock.detach()
    raise SetupError(
        f"descriptor {name!r} carries no frames: pass a tap, a raw packet socket, or one end of "
        "a unix SOCK_SEQPACKET pair"
    )


# -- interfaces by name ------------------------------------------------------


def interface_mtu(name: str) -> int:
    """Return an interface's MTU.  Raises SetupError when there is no such interface."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, SIOCGIFMTU, _IFREQ.pack(_interface_name(name), 0))
        except OSError as error:
            raise SetupError(
                f"no interface {name}: ip link shows which there are ({error.strerror})"
            ) from error
    mtu: int = struct.unpack_from("=i", answer, 16)[0]
    return mtu


def check_mtu(mtu: int, least: int = ipv4.MINIMUM_MTU) -> int:
    """Return the MTU if packets of that size exist.  Raises SetupError."""
    if not least <= mtu <= 65535:
        raise SetupError(f"an MTU of {mtu} is out of range: {least} to 65535 octets")
    return mtu


def _interface_name(name: str) -> bytes:
    octets = os.fsencode(name)
    if not 0 < len(octets) < 16 or "/" in name or name in (".", ".."):
        raise SetupError(f"{name!r} is not an interface's name: 1 to 15 octets, without slashes")
    return octets
