"""docs/conformance.md says what the tests compare; its digits come from `python tests/conformance.py`."""

import pytest

pytest.importorskip("peft")
from conformance import COLUMNS, NUMBER, PAGE, page, without_digits


def test_the_page_is_that_of_the_tables():
    assert without_digits(PAGE.read_text()) == page(lambda _: "#"), "run: python tests/conformance.py"


def test_every_difference_on_the_page_is_within_the_bounds_of_the_tests():
    found = [float(number) for number in NUMBER.findall(PAGE.read_text())]
    assert len(found) == sum(map(len, COLUMNS.values()))
    assert max(found) <= 1e-5
