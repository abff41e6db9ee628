"""Echo mode: send back what arrives, on every socket family."""
