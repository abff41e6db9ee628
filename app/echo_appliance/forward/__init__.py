"""Forward mode: relay each inherited socket to a target on any other socket family."""
