"""docs/virtio-clauses.md is what the markers of the tests say, and every requirement of the specification is in it."""

from tests.support import clauses


def test_the_clause_table_is_current() -> None:
    assert clauses.TABLE.read_text() == clauses.render(), "run python -m tests.support.clauses"


def test_every_requirement_is_listed_or_does_not_apply() -> None:
    assert clauses.problems() == []
