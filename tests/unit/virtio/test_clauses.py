"""docs/virtio-clauses.md is what the markers of the tests say."""

from tests.support import clauses


def test_the_clause_table_is_current() -> None:
    assert clauses.TABLE.read_text() == clauses.render(), "run python -m tests.support.clauses"
