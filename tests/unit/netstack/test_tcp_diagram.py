"""The picture of the states is the table in the code."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from echo_appliance.netstack.tcp.states import State

SCRIPT = Path(__file__).parents[3] / "scripts/tcp-states"


def load() -> ModuleType:
    spec = spec_from_loader("tcp_states", SourceFileLoader("tcp_states", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_diagram_is_current() -> None:
    script = load()
    assert script.PICTURE.read_text() == script.draw(), "run scripts/tcp-states"


def test_diagram_shows_every_state() -> None:
    picture = load().draw()
    assert all(f">{state.value}<" in picture for state in State)
