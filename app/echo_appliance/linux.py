"""Linux constants that Python 3.11's socket module lacks.

Values are the generic ABI of include/uapi/linux/in.h and in6.h; they are the
same on every architecture the image is built for.
"""

IP_PKTINFO = 8
IP_FREEBIND = 15
IP_RECVORIGDSTADDR = 20
IP_ORIGDSTADDR = IP_RECVORIGDSTADDR  # the option's number is its control message's type too

IPV6_RECVORIGDSTADDR = 74
IPV6_ORIGDSTADDR = IPV6_RECVORIGDSTADDR
IPV6_FREEBIND = 78

# Taps: include/uapi/linux/if_tun.h.  The ioctl numbers are right where an ioctl's direction is in
# its two highest bits, which is so on amd64, arm64, s390x and riscv64.
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
IFF_TUN = 0x0001
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
SIOCGIFMTU = 0x8921
SIOCGIFHWADDR = 0x8927

# Packet sockets: include/uapi/linux/if_packet.h.
ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_QDISC_BYPASS = 20
PACKET_IGNORE_OUTGOING = 23

# asm-generic/socket.h, linux/filter.h
SO_ATTACH_FILTER = 26
SKF_AD_VLAN_TAG_PRESENT = 0xFFFFF000 + 48
