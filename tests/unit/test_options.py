"""The command-line parser: every way of saying a value, and every way of getting it wrong."""

import pytest

from echo_appliance.options import Parser, add_service_options, count, positive, seconds


class Options:
    """What the parser fills."""

    size: int
    wait: float
    loud: bool
    targets: list[str]
    max_connections: int | None
    exit_idle: float
    drain: float


def make_parser() -> Parser:
    parser = Parser("prog", "Does things.")
    parser.add("targets", metavar="TARGET", help="what to do them to")
    parser.add("--size", positive, default=64, metavar="N", help="how large")
    parser.add("--wait", seconds, default=0.0, metavar="S", help="how long")
    parser.add("--loud", default=False, help="noise")
    return parser


def test_parser_without_options_gives_the_defaults() -> None:
    options = make_parser().parse(["a"], Options())
    assert (options.size, options.wait, options.loud) == (64, 0.0, False)
    assert options.targets == ["a"]


def test_parser_takes_options_anywhere_and_in_both_forms() -> None:
    options = make_parser().parse(["a", "--size", "3", "b", "--wait=1.5", "--loud", "c"], Options())
    assert (options.size, options.wait, options.loud) == (3, 1.5, True)
    assert options.targets == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name at least one TARGET"),
        (["a", "--colour"], "unknown option --colour"),
        (["a", "-x"], "unknown option -x"),
        (["a", "--siz", "3"], "unknown option --siz"),
        (["a", "--size"], "--size needs a value, N"),
        (["a", "--size", "0"], "--size: '0' is not a whole number, 1 or more"),
        (["a", "--size", "1e3"], "--size: '1e3' is not a whole number, 1 or more"),
        (["a", "--size", "٣"], "is not a whole number"),
        (["a", "--wait", "nan"], "is not a number of seconds"),
        (["a", "--wait", "inf"], "is not a number of seconds"),
        (["a", "--wait=-1"], "is not a number of seconds"),
        (["a", "--loud=yes"], "--loud takes no value"),
    ],
)
def test_parser_mistake_is_told_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse(arguments, Options())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert error.endswith("see prog --help\n")


def test_parser_without_positionals_refuses_them(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("prog", "Does things.")
    with pytest.raises(SystemExit):
        parser.parse(["x"], Options())
    assert "'x' is not an option" in capsys.readouterr().err


def test_parser_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse(["a", "--help"], Options())
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("usage: prog [option ...] TARGET ...", "--size N", "how large", "--loud"):
        assert words in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_service_options_have_the_documented_defaults() -> None:
    parser = Parser("prog", "Serves.")
    add_service_options(parser)
    options = parser.parse([], Options())
    assert options.max_connections is None
    assert (options.exit_idle, options.drain) == (0.0, 5.0)


@pytest.mark.parametrize("text", ["0", "7", "1000000"])
def test_count_reads_whole_numbers(text: str) -> None:
    assert count(text) == int(text)


def test_parser_takes_a_lone_dash_as_a_word_and_an_optional_list_may_be_empty() -> None:
    parser = Parser("prog", "Does things.")
    parser.add("targets", default=[], metavar="FILE", help="- is standard input")
    assert parser.parse(["-"], Options()).targets == ["-"]
    assert parser.parse([], Options()).targets == []
