"""TCP without I/O.  Read states, connection, receiver, sender, in this order; then the rest."""
