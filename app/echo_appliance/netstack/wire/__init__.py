"""The protocols' own formats: octets to values and back.  Nothing here knows I/O or time.

The message of each ParseError is the reason that a dropped packet is counted by.
"""
