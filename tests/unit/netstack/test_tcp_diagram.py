"""The picture of the states is the table in the code."""

from echo_appliance.netstack.tcp.states import State
from scripts.tcp_states import PICTURE, draw


def test_diagram_is_current() -> None:
    assert PICTURE.read_text() == draw(), "run scripts/tcp_states.py"


def test_diagram_shows_every_state() -> None:
    assert all(f">{state.value}<" in draw() for state in State)
