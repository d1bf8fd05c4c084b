"""What a library raises over a stranger's file is one line; what stops a program is not caught."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models

from pmod_cli.output.errors import PmodError, first_line, told_as


def test_a_panic_of_the_tokenizers_library():
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    broken = Tokenizer(models.BPE(vocabulary, [("a", "b")])).to_str()
    broken = broken.replace('"continuing_subword_prefix":null', f'"continuing_subword_prefix":"{"x" * 100}"')
    with pytest.raises(PmodError, match="cannot load it: "), told_as("cannot load it"):
        Tokenizer.from_str(broken)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_stops_a_program_goes_through(error):
    with pytest.raises(error), told_as("cannot load it"):
        raise error


def test_a_first_line_that_ends_in_a_colon_says_nothing_yet():
    assert first_line(ValueError("Validation error for 'a':\n  int expected\nmore")) == (
        "Validation error for 'a': int expected"
    )
    assert first_line(ValueError("\n no\nmore")) == "no"
    assert first_line(ValueError()) == "ValueError"
