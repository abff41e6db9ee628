"""Admission against the plain definition of its limits."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from echo_appliance.admission import Admission
from tests.unit.fakes import nothing

Sources = st.sampled_from(["a", "b", "c", None])


@given(st.integers(0, 5), st.integers(0, 3), st.lists(st.tuples(st.booleans(), Sources)))
def test_admission_any_history_keeps_both_limits(
    limit: int, per_source: int, history: list[tuple[bool, str | None]]
) -> None:
    admission = Admission(limit, per_source, nothing)
    held: Counter[str | None] = Counter()
    for arrives, source in history:
        if arrives and not admission.full:
            expected = not (per_source and source is not None and held[source] >= per_source)
            assert admission.admit(source) is expected
            held[source] += expected
        elif not arrives and held[source]:
            admission.release(source)
            held[source] -= 1
        assert admission.open == held.total()
        assert admission.full == (0 < limit <= held.total())
        assert not limit or held.total() <= limit
