"""The constants of our TCP, each with its section, and what may be set per endpoint.

Times are seconds, sizes octets.
"""

NEVER = float("inf")  # the time of what is not to happen

MSL = 30.0  # RFC 9293 section 3.4.2 has 120; 30 is what the Internet uses since it runs at gigabits
TIME_WAIT = 2 * MSL  # MUST-13
ORPHAN_TIMEOUT = 60.0  # Linux's tcp_fin_timeout: for a FIN that no application waits for

# Retransmission (RFC 6298).  The floor of one second that section 2.4 recommends dates from clocks
# that ticked every 500 ms; 0.2 is what Linux has, and longer than others delay an ACK (0.04-0.2).
INITIAL_RTO = 1.0  # section 2.1
MIN_RTO = 0.2
MAX_RTO = 60.0  # section 2.5
RTO_AFTER_LOST_SYN = 3.0  # section 5.7
CLOCK_GRANULARITY = 0.001  # G of section 2; also the unit of our timestamps

SUSPECT_AFTER = 3  # R1 of RFC 9293 section 3.8.3, in time-outs: SHLD-10
USER_TIMEOUT = 120.0  # R2 of RFC 9293 section 3.8.3: SHLD-11, at least 100
SYN_TIMEOUT = 180.0  # R2 for a SYN: MUST-23, at least 180

DELAYED_ACK = 0.04  # MUST-40: less than 0.5
KEEPALIVE_IDLE = 7200.0  # MUST-28: the interval that is the default is no less than two hours
KEEPALIVE_INTERVAL = 75.0
KEEPALIVE_PROBES = 9

CHALLENGE_INTERVAL = 0.5  # RFC 5961 section 7: one challenge ACK per connection and interval
PAWS_IDLE = 24 * 86400.0  # RFC 7323 section 5.5: after that, the timestamp that we keep is void

DEFAULT_MSS_V4, DEFAULT_MSS_V6 = 536, 1220  # MUST-15: of a peer that sends no MSS option
MIN_MSS = 48  # a smaller one is taken for this: forty header octets per octet help only attackers
TIMESTAMPS_LENGTH = 12  # octets of each segment's header, padding included
MAX_WINDOW_SHIFT = 14  # RFC 7323 section 2.3
MAX_UNSCALED_WINDOW = 0xFFFF

INITIAL_WINDOW = 10  # segments: RFC 6928
DUPLICATE_THRESHOLD = 3  # RFC 5681 section 3.2
MAX_ISLANDS = 128  # pieces of stream that wait for what is missing before them
MAX_RECORDS = 4096  # segments in flight: a peer with a tiny MSS could have us look at any number

MAX_HALF_OPEN = 256  # per listener; beyond them there are SYN cookies
MAX_TIME_WAIT = 4096  # per endpoint, like the next two; the oldest is forgotten first
MAX_CONNECTIONS = 16384
MAX_RESETS_PER_SECOND = 1000


class Settings:
    """What an application may choose.  One connection's memory is bounded by both limits."""

    __slots__ = (
        "congestion", "delayed_ack", "hop_limit", "keepalive", "keepalive_idle", "nagle",
        "receive_limit", "send_limit", "traffic_class", "user_timeout",
    )  # fmt: skip

    def __init__(
        self,
        *,
        receive_limit: int = 1 << 20,
        send_limit: int = 1 << 20,
        nagle: bool = True,
        delayed_ack: float = DELAYED_ACK,
        keepalive: bool = False,
        keepalive_idle: float = KEEPALIVE_IDLE,
        user_timeout: float = USER_TIMEOUT,
        congestion: str = "cubic",
        hop_limit: int = 64,
        traffic_class: int = 0,
    ) -> None:
        self.receive_limit = receive_limit  # octets that wait to be read, in order or not
        self.send_limit = send_limit  # octets that wait to be sent or acknowledged
        self.nagle = nagle
        self.delayed_ack = delayed_ack
        self.keepalive = keepalive  # off unless asked for (MUST-24, MUST-25)
        self.keepalive_idle = keepalive_idle  # seconds of silence before the first probe
        self.user_timeout = user_timeout  # seconds without any progress (MUST-21)
        self.congestion = congestion  # "cubic" or "newreno"
        self.hop_limit = hop_limit  # for the IP header: MUST-49
        self.traffic_class = traffic_class  # likewise: MUST-48
