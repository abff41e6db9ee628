"""Counters, merged and rendered."""

from echo_appliance.metrics import Registry, merge, render, summary, total, without_gauges


def test_registry_gives_one_counters_object_per_name() -> None:
    registry = Registry()
    assert registry.counters("demo") is registry.counters("demo")
    assert registry.counters("demo") is not registry.counters("other")


def test_render_names_every_counter_with_its_descriptor() -> None:
    registry = Registry()
    counters = registry.counters("demo")
    counters.accepted, counters.open, counters.received, counters.sent = 3, 1, 100, 90
    counters.refuse("source-limit")
    counters.end("reset")
    counters.end("reset")
    counters.drop("refused-port")
    lines = render(registry.snapshot()).splitlines()
    assert 'echo_appliance_connections_total{name="demo"} 3' in lines
    assert 'echo_appliance_connections{name="demo"} 1' in lines
    assert 'echo_appliance_received_octets_total{name="demo"} 100' in lines
    assert 'echo_appliance_sent_octets_total{name="demo"} 90' in lines
    assert 'echo_appliance_connections_refused_total{name="demo",reason="source-limit"} 1' in lines
    assert 'echo_appliance_connections_ended_total{name="demo",reason="reset"} 2' in lines
    assert 'echo_appliance_dropped_datagrams_total{name="demo",reason="refused-port"} 1' in lines
    assert "# TYPE echo_appliance_connections gauge" in lines
    assert any(line.startswith("process_start_time_seconds ") for line in lines)


def test_render_escapes_what_a_label_cannot_hold() -> None:
    registry = Registry()
    registry.counters('a"b\\c\nd')
    assert r'name="a\"b\\c\nd"' in render(registry.snapshot())


def test_merge_adds_up_what_workers_counted() -> None:
    first, second = Registry(), Registry()
    first.counters("a").accepted = 2
    second.counters("a").accepted = 3
    second.counters("b").drop("too-long")
    merged = merge([first.snapshot(), second.snapshot()])
    assert merged[("connections_total", "a", "")] == 5
    assert merged[("dropped_datagrams_total", "b", "too-long")] == 1


def test_without_gauges_keeps_counters_of_a_dead_worker_but_not_its_connections() -> None:
    registry = Registry()
    registry.counters("a").accepted = 2
    registry.counters("a").open = 2
    rest = without_gauges(registry.snapshot())
    assert total(rest, "connections_total") == 2
    assert total(rest, "connections") == 0


def test_summary_fits_a_status_line() -> None:
    registry = Registry()
    registry.counters("a").accepted = 2
    registry.counters("b").open = 1
    text = summary(registry.snapshot())
    assert text == "1 connections open, 2 taken, 0 datagrams, 0 octets received"
