"""The first hour of new users, in short; `make first-hour` is the whole of it."""

import pytest
from first_hour import PERSONAS, first_hour


@pytest.mark.slow
def test_the_first_hour_in_short(minilm, tmp_path):
    assert first_hour(tmp_path, rows=140, epochs=1, names="".join(PERSONAS)) > 20
