"""Netstack mode: a TCP/IP stack of our own, on a frame descriptor that we inherit."""
