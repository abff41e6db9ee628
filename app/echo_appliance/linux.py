"""Linux constants that Python 3.11's socket module lacks.

Values are the generic ABI of include/uapi/linux/in.h and in6.h; they are the
same on every architecture the image is built for.
"""

IP_PKTINFO = 8
IP_RECVORIGDSTADDR = 20
IP_ORIGDSTADDR = IP_RECVORIGDSTADDR  # the option's number is its control message's type too

IPV6_RECVORIGDSTADDR = 74
IPV6_ORIGDSTADDR = IPV6_RECVORIGDSTADDR
IPV6_FREEBIND = 78
