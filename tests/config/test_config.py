"""Flags made from dataclasses: spelling, values, one-line errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fairseq.config import FlagParser, build, field_help, flag, float_list, literal_dict, require_at_least, to_dict


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """A part."""

    num_things: int = flag("--num-things", "--nt", default=3)
    """How many things."""
    rate: float | None = flag("--rate", default=None)
    """How fast."""
    loud: bool = flag("--loud", default=False)
    """Whether it makes noise."""
    betas: tuple[float, ...] = flag("--betas", default=(0.9, 0.98))
    """Two numbers."""
    extra: dict[str, Any] | None = flag("--extra", default=None)
    """More."""
    mark: str | None = flag("--mark", default=None, const="@@ ")
    """Optional value."""

    def __post_init__(self) -> None:
        require_at_least(1, num_things=self.num_things)


@pytest.fixture
def parser() -> FlagParser:
    made = FlagParser("part.py", "Parts.")
    made.add_config(PartConfig)
    made.add_ignored("--old-switch", takes_value=False)
    made.add_ignored("--old_value", takes_value=True)
    return made


def test_only_what_was_given_is_returned(parser: FlagParser) -> None:
    assert parser.parse([]) == {}
    assert parser.parse(["--loud"]) == {"loud": True}


@pytest.mark.parametrize("spelling", ["--num-things", "--num_things", "--nt"])
def test_dashes_underscores_and_aliases_name_the_same_field(parser: FlagParser, spelling: str) -> None:
    assert parser.parse([spelling, "5"]) == {"num_things": 5}
    assert parser.parse([f"{spelling}=5"]) == {"num_things": 5}


def test_values_are_read_by_annotation(parser: FlagParser) -> None:
    words = ["--rate", "1e-3", "--betas", "(0.9, 0.99)", "--extra", "{'a': 1}", "--mark"]
    assert parser.parse(words) == {"rate": 1e-3, "betas": (0.9, 0.99), "extra": {"a": 1}, "mark": "@@ "}


def test_build_fills_defaults_and_checks(parser: FlagParser) -> None:
    assert build(PartConfig, parser.parse(["--rate", "2"])) == PartConfig(rate=2.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        build(PartConfig, {"num_things": 0})


def test_a_limit_is_told_with_the_flag_as_it_is_spelt() -> None:
    require_at_least(1, num_things=1, code_size=None)
    with pytest.raises(ValueError, match=r"^--code-size must be at least 0\.5, got nan$"):
        require_at_least(0.5, num_things=0.5, code_size=float("nan"))
    with pytest.raises(ValueError, match=r"^--code_size must be at least 1, got 0; leave it out$"):
        require_at_least(1, between="_", hint="leave it out", num_things=None, code_size=0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-thing", "3"], "unknown flag --num-thing (did you mean '--num-things'?)"),
        (["--num-things", "many"], "invalid int value: 'many'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--extra", "__import__('os')"], "is not a literal"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_exit_status_2(
    parser: FlagParser, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser.parse(words)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1


def test_a_flag_of_another_part_is_explained(parser: FlagParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse(["--momentum", "0.9"], {"--momentum": "belongs to --optimizer nag, not to adam"})
    assert "--momentum belongs to --optimizer nag, not to adam" in capsys.readouterr().err


def test_ignored_flags_are_recognised_and_taken_out(parser: FlagParser) -> None:
    given = parser.parse(["--old-switch", "--old-value", "7", "--loud"])
    assert parser.pop_ignored(given) == ["--old-switch", "--old_value"]
    assert given == {"loud": True}


def test_peek_passes_over_what_it_does_not_know(parser: FlagParser) -> None:
    assert parser.peek(["data", "--unknown", "1", "--nt", "4", "--help"]) == {"num_things": 4}


def test_help_texts_are_the_strings_under_the_fields() -> None:
    assert field_help(PartConfig)["rate"] == "How fast."


def test_to_dict_is_plain() -> None:
    assert to_dict(PartConfig())["betas"] == [0.9, 0.98]


def test_lists_and_dictionaries_are_never_evaluated() -> None:
    assert float_list("(0.9,0.98)") == (0.9, 0.98)
    with pytest.raises(ValueError, match="is not a comma-separated list of numbers"):
        float_list("().__class__")
    assert literal_dict("{'x': (1, 2)}") == {"x": (1, 2)}
