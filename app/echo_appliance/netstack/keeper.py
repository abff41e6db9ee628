"""Keeps the kernel away from addresses that it has and that we answer for.

On an interface that we share with it by a packet socket, the kernel would reset
our connections: it knows none of them.  A chain at ingress drops our packets
where packet sockets have seen them already, and nothing else has.

The chain goes when we go, however that is: nft holds its table for as long as
its standard input is open ("flags owner").  Source: nft(8), "Tables", "Chains".
"""

import os
import socket
import subprocess

from ..errors import SetupError
from .addresses import format_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_END = "}"  # how the listing of a table ends
_PATIENCE = 5.0


def keep_away(interface: str, addresses: "Iterable[bytes]") -> "Callable[[], None] | None":
    """Keep the kernel away from those of the addresses that it has; return what lets it back.

    None when it has none of them.  Raises SetupError.
    """
    shared = [address for address in addresses if _kernel_has(address)]
    if not shared:
        return None
    words = " and ".join(map(format_ip, shared))
    try:
        nft = subprocess.Popen(
            ["nft", "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except OSError as error:
        raise SetupError(
            f"the kernel has {words} too and would reset our connections, and nft cannot keep it "
            f"away ({error.strerror}): install nftables, or take another --address"
        ) from error

    def let_back() -> None:
        nft.communicate(timeout=_PATIENCE)

    _set_up(nft, _commands(interface, shared), words)
    return let_back


def _kernel_has(address: bytes) -> bool:
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((format_ip(address), 0))
        except OSError:
            return False
    return True


def _commands(interface: str, addresses: list[bytes]) -> str:
    table = f"netdev echo_appliance_{os.getpid()}"
    rule = f"add rule {table} ours"
    hook = f'type filter hook ingress device "{interface}" priority -500;'
    lines = [f"add table {table} {{ flags owner; }}", f"add chain {table} ours {{ {hook} }}"]
    for address in addresses:
        if len(address) == 4:
            lines += [f"{rule} {kind} {format_ip(address)} drop"
                      for kind in ("ip daddr", "arp daddr ip")]  # fmt: skip
        else:
            lines.append(f"{rule} ip6 daddr {format_ip(address)} drop")
            # Its target, at octet 8: older versions of nft have no word for it.
            lines.append(
                f"{rule} icmpv6 type nd-neighbor-solicit @th,64,128 0x{address.hex()} drop"
            )
    return "\n".join([*lines, f"list table {table}", ""])


def _set_up(nft: "subprocess.Popen[str]", commands: str, words: str) -> None:
    """Have nft do it, and wait until it has."""
    if nft.stdin is None or nft.stdout is None:
        raise RuntimeError("nft was started without pipes")
    nft.stdin.write(commands)
    nft.stdin.flush()
    for line in nft.stdout:
        if line.startswith("Error"):
            nft.kill()
            nft.communicate()
            raise SetupError(
                f"the kernel has {words} too, and nft cannot keep it away "
                f"({line.strip()}): be root, or take another --address"
            )
        if line.rstrip() == _END:
            return
    raise SetupError(f"nft ended before it kept the kernel away from {words}")
