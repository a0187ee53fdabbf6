"""The first hour of new users, in short; `make first-hour` is the whole of it."""

import pytest
from first_hour import main


@pytest.mark.slow
def test_the_first_hour_in_short(minilm, tmp_path, capsys):
    assert main(["--rows", "140", "--epochs", "1", "--keep", str(tmp_path)]) == 0
    steps = int(capsys.readouterr().out.rpartition("first hour: ")[2].split()[0])
    assert steps > 20


def test_a_persona_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["A", "X"])
    assert "no persona X" in capsys.readouterr().err
