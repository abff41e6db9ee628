"""echo-appliance: echo, forward, dispatch or speak TCP/IP on sockets that systemd hands over."""
