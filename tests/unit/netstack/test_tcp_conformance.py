"""The register of conformance: each MUST of RFC 9293 (appendix B), and the tests that show it.

What a requirement says is put in our words; the RFC's are in its appendix.  The
tests below see to it that no number is missing and that the named tests exist,
so that a test that is renamed or dropped is noticed here.
"""

import ast
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[2]
COUNT = 69

REGISTER: dict[int, tuple[str, str]] = {
    1: ("window sizes are unsigned",
        "test_parse_window_is_unsigned test_window_of_65535_is_not_negative"),
    2: ("what is sent has a checksum",
        "test_capture_of_all_that_we_send_is_right_to_the_last_checksum"),
    3: ("what comes has its checksum verified",
        "test_segment_with_a_wrong_checksum_is_dropped"),
    4: ("end of list, NOP and MSS are supported",
        "test_parse_syn_of_linux test_options_end_before_the_header_does"),
    5: ("options are read in any segment", "test_options_are_read_in_any_segment"),
    6: ("unknown options are skipped", "test_options_unknown_are_skipped_by_their_length"),
    7: ("illegal lengths of options do no harm",
        "test_options_that_lie_are_refused test_option_truncated_is_refused"
        " test_option_that_lies_about_its_length_is_dropped"),
    8: ("initial numbers are driven by a clock",
        "test_initial_numbers_follow_a_clock_and_a_secret"),
    9: ("nobody outside can compute them", "test_initial_numbers_follow_a_clock_and_a_secret"),
    10: ("SYNs that cross open a connection",
         "test_simultaneous_open_both_syns_cross_and_both_are_established"
         " test_simultaneous_open_carries_data_both_ways"),
    11: ("SYN-RECEIVED remembers who opened",
         "test_syn_received_reset_or_new_syn_returns_to_listen"
         " test_simultaneous_open_reset_refuses"),
    12: ("the application can tell an abort from an end",
         "test_reset_at_the_next_number_ends_the_connection_and_tells_why"
         " test_close_wait_can_still_send_all_it_has"),
    13: ("TIME-WAIT lasts two segment lifetimes", "test_time_wait_lasts_two_segment_lifetimes"),
    14: ("the MSS option is sent and heeded",
         "test_connect_sends_a_syn_with_all_options"
         " test_syn_sent_syn_ack_comes_and_is_acknowledged"),
    15: ("without one, 536 or 1220 is assumed",
         "test_mss_option_absent_the_default_is_used"),
    16: ("options count against a segment's size",
         "test_mss_is_reduced_by_the_options_of_every_segment"),
    17: ("Nagle's algorithm can be switched off",
         "test_nagle_off_every_write_leaves_at_once"),
    18: ("what was repeated gives no round trip (Karn)",
         "test_time_out_that_was_repeated_gives_no_sample"),
    19: ("slow start, congestion avoidance, back-off",
         "test_congestion_window_begins_with_ten_segments_and_doubles"
         " test_newreno_avoidance_adds_one_segment_per_round_trip"
         " test_time_out_sends_the_first_segment_again_and_doubles"),
    20: ("at R1 the IP layer is told, at R2 the connection ends",
         "test_suspect_path_is_told_after_three_time_outs"
         " test_time_outs_for_the_user_time_out_end_the_connection"),
    21: ("the application can set R2",
         "test_time_outs_for_the_user_time_out_end_the_connection"),
    22: ("SYNs are handled alike", "test_syn_lost_is_sent_again_with_doubling_time_outs"),
    23: ("R2 of a SYN is three minutes or more",
         "test_syn_never_answered_times_out_after_three_minutes"),
    24: ("keepalive can be asked for",
         "test_keepalive_asks_after_the_interval_of_silence"),
    25: ("keepalive is off by default", "test_keepalive_is_off_by_default"),
    26: ("keepalive asks only when idle",
         "test_keepalive_asks_nothing_while_data_are_under_way"
         " test_keepalive_asks_after_the_interval_of_silence"),
    27: ("the keepalive interval can be set",
         "test_keepalive_asks_after_the_interval_of_silence"),
    28: ("and is two hours or more if not", "test_keepalive_interval_not_set_is_two_hours"),
    29: ("one lost keepalive means nothing",
         "test_keepalive_lost_once_is_no_end_but_always_is"),
    30: ("urgent data are supported",
         "test_urgent_data_are_sent_with_the_pointer_after_the_last_octet"),
    31: ("of any length", "test_urgent_data_of_any_length_are_told_while_they_are_read"),
    32: ("the application is told at once",
         "test_urgent_pointer_calls_the_application_before_the_data_are_there"),
    33: ("and can ask how much", "test_urgent_data_of_any_length_are_told_while_they_are_read"),
    34: ("a window that shrinks does no harm",
         "test_window_of_the_peer_shrinks_and_nothing_breaks"),
    35: ("a zero window is probed",
         "test_window_zero_is_probed_after_a_time_out_and_then_ever_more_rarely"),
    36: ("with at least one octet",
         "test_window_zero_is_probed_after_a_time_out_and_then_ever_more_rarely"),
    37: ("and may last for ever",
         "test_window_zero_for_days_keeps_the_connection_while_probes_are_answered"
         " test_reader_slow_the_sender_waits_and_memory_stays_bounded"),
    38: ("a sender makes no silly windows worse",
         "test_window_of_the_peer_bounds_what_is_sent"
         " test_window_too_small_for_a_segment_is_used_after_a_time_out"),
    39: ("a receiver opens none", "test_window_opens_in_steps_worth_a_segment"),
    40: ("no acknowledgment waits half a second",
         "test_ack_delayed_is_sent_within_the_delay"),
    41: ("listening disturbs no connection",
         "test_listener_gone_resets_what_was_half_open_and_keeps_the_rest"),
    42: ("one port can be listened to on several addresses",
         "test_listener_on_one_address_goes_before_that_on_all"),
    43: ("an open may name its local address",
         "test_connection_speaks_from_the_address_that_is_near"
         " test_listener_on_one_address_goes_before_that_on_all"),
    44: ("if it does not, the IP layer chooses",
         "test_connection_speaks_from_the_address_that_is_near"),
    45: ("and the connection keeps to it",
         "test_listener_gives_a_connection_once_it_is_established"),
    46: ("nobody connects to a group", "test_connect_to_a_group_is_refused"),
    47: ("soft errors reach the application",
         "test_icmp_is_believed_only_for_what_is_in_flight"
         " test_icmp_error_never_ends_an_established_connection"),
    48: ("the Diffserv field can be set",
         "test_hop_limit_and_traffic_class_of_settings_are_in_the_packets"),
    49: ("the hop limit can be set",
         "test_hop_limit_and_traffic_class_of_settings_are_in_the_packets"),
    50: ("unknown IP options are ignored", "test_ipv4_options_are_skipped"),
    54: ("ICMP errors are acted upon",
         "test_icmp_is_believed_only_for_what_is_in_flight"
         " test_path_mtu_narrows_for_a_segment_that_is_on_its_way"),
    55: ("source quench is dropped", "test_source_quench_changes_nothing"),
    56: ("soft errors end no connection",
         "test_icmp_error_never_ends_an_established_connection"),
    57: ("SYNs to a group are dropped",
         "test_syn_to_or_from_a_group_is_dropped_silently"
         " test_syn_to_a_broadcast_address_opens_nothing"),
    58: ("acknowledgments are aggregated", "test_ack_for_a_batch_of_segments_is_one"),
    59: ("a batch is processed before any is sent", "test_ack_for_a_batch_of_segments_is_one"),
    60: ("what was written does not stay behind",
         "test_nagle_holds_a_second_small_segment_back"
         " test_window_too_small_for_a_segment_is_used_after_a_time_out"),
    61: ("the last segment of a write is pushed",
         "test_write_is_cut_into_segments_and_the_last_is_pushed"),
    62: ("the urgent pointer is after the last urgent octet",
         "test_urgent_data_are_sent_with_the_pointer_after_the_last_octet"),
    63: ("SYNs from invalid addresses are dropped",
         "test_syn_to_or_from_a_group_is_dropped_silently"
         " test_packet_between_wrong_addresses_is_dropped"),
    64: ("options need no alignment", "test_options_unaligned_are_read"),
    65: ("MSS is sent in SYNs only", "test_mss_option_is_in_syns_only"),
    66: ("RST and URG count at a zero window",
         "test_reset_at_a_zero_window_is_believed"
         " test_urgent_pointer_counts_even_with_a_zero_window"),
    67: ("the MSS that we announce is what the link takes",
         "test_mtu_of_the_link_is_kept test_connect_sends_a_syn_with_all_options"),
    68: ("every option but two has a length",
         "test_serialize_syn_every_option_has_its_length_and_place"
         " test_segment_any_options_parse_or_raise_parse_error"),
    69: ("after the end of the list there are zeros",
         "test_serialize_syn_every_option_has_its_length_and_place"
         " test_serialize_sack_blocks_beside_timestamps"),
}  # fmt: skip

# Source routes let a sender choose the way of the answers, and so pass for anyone: packets with
# them are dropped (RFC 7126 section 4.3, RFC 5095), by the interface, before TCP sees them.
DOES_NOT_APPLY = {
    51: "the application could name a source route: we send none",
    52: "which would go before a received one: none is received",
    53: "and answers would go back along it: likewise",
}


@cache
def test_functions() -> frozenset[str]:
    """The names of all tests that there are."""
    return frozenset(
        node.name
        for file in TESTS.glob("*/**/test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


test_functions.__test__ = False  # type: ignore[attr-defined]


def test_register_has_every_requirement_once() -> None:
    assert sorted([*REGISTER, *DOES_NOT_APPLY]) == list(range(1, COUNT + 1))


def test_register_names_tests_that_exist() -> None:
    named = {name for _, names in REGISTER.values() for name in names.split()}
    assert named - test_functions() == set()
