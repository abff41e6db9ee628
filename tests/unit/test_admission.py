"""Admission: the two limits, and who is told when there is room again."""

from echo_appliance.admission import Admission
from tests.unit.fakes import nothing


def test_admission_at_the_limit_is_full_until_a_release() -> None:
    admission = Admission(2, 0, nothing)
    assert admission.admit("a")
    assert not admission.full
    assert admission.admit("b")
    assert admission.full
    admission.release("a")
    assert not admission.full


def test_admission_without_limits_is_never_full() -> None:
    admission = Admission(0, 0, nothing)
    assert all(admission.admit("a") for _ in range(1000))
    assert not admission.full


def test_admission_of_one_source_is_refused_at_its_share_and_others_are_not() -> None:
    admission = Admission(10, 2, nothing)
    assert admission.admit("a")
    assert admission.admit("a")
    assert not admission.admit("a")
    assert admission.admit("b")
    assert admission.open == 3, "a refused connection is not counted"


def test_admission_of_unix_peers_is_counted_in_total_only() -> None:
    admission = Admission(3, 1, nothing)
    assert admission.admit(None)
    assert admission.admit(None)
    assert admission.open == 2


def test_admission_release_forgets_a_source_that_has_none_left() -> None:
    admission = Admission(0, 5, nothing)
    for number in range(100):
        admission.admit(str(number))
        admission.release(str(number))
    assert not admission._sources, "or a scan of the address space would fill the memory"


def test_admission_release_wakes_each_waiting_acceptor_once() -> None:
    admission = Admission(2, 0, nothing)
    woken: list[str] = []
    admission.admit("a")
    admission.admit("a")
    admission.wait_for_room(lambda: woken.append("first"))
    admission.wait_for_room(lambda: woken.append("second"))
    admission.release("a")
    admission.release("a")
    assert woken == ["first", "second"]


def test_admission_release_lets_a_woken_acceptor_wait_again() -> None:
    admission = Admission(1, 0, nothing)
    turns: list[int] = []

    def resume() -> None:
        turns.append(len(turns))
        admission.wait_for_room(resume)

    admission.admit(None)
    admission.wait_for_room(resume)
    admission.release(None)
    assert turns == [0]
