"""The sidecar in the guest steers every port of a prefix; the first client starts the server."""

from __future__ import annotations

from testinfra.host import Host

from tests.vm.conftest import APP, wait_until

UNIT = "dispatch@steered.service"
# None is bound by anybody; the sidecar of the VM may not answer from ports below 1024.
TARGETS = "tcp:127.0.0.128:1 tcp:127.0.0.200:4321 tcp:127.0.0.255:65535 udp:127.0.0.129:33333"


def test_sidecar_steers_the_prefix_to_a_container_that_it_starts(root: Host) -> None:
    wait_until(lambda: root.service(UNIT).is_running, "the sidecar", 100)
    done = root.run(f"{APP} probe --timeout 60 --count 3 {TARGETS}")
    assert done.rc == 0, done.stdout + root.check_output("journalctl -n 40 --no-pager")
    assert root.service("echo@steered.service").is_running


def test_sidecar_leaves_other_addresses_alone(root: Host) -> None:
    wait_until(lambda: root.service(UNIT).is_running, "the sidecar", 100)
    done = root.run(f"{APP} probe tcp:127.0.0.127:4321 tcp:127.0.1.128:4321")
    assert done.stdout.count("refused: nobody listens there") == 2
