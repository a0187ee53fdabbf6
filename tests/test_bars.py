"""Names come from files: the bars show them as they are, whatever a terminal or rich would read in them."""

import io
import re

import pytest
from rich.console import Console

from loralab.run import Settings
from loralab.run.bar import Bar
from loralab.study.bar import StudyBar

NAMES = {
    "LoRA [r=8]": "LoRA [r=8]",
    "a [/b] [link=x]": "a [/b] [link=x]",
    ":smile: [red]": ":smile: [red]",
    "x\x1b[31mred\r\x07\x9b2J": "x\\x1b[31mred \\x07\\x9b2J",
    "two\nlines": "two lines",
}


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def written(request, monkeypatch):
    """What bars write on stderr, by a console with or without a terminal."""
    text = io.StringIO()

    def console(**_):
        return Console(file=text, force_terminal=request.param, width=200, color_system=None, highlight=False)

    for place in ("loralab.run.bar.Console", "loralab.study.bar.Console"):
        monkeypatch.setattr(place, console)
    monkeypatch.setattr("loralab.run.bar.Pulse.due", lambda _: True)
    return text


def shown(text: io.StringIO) -> str:
    """The text without what rich writes to move the cursor."""
    return re.sub(r"\x1b\[(\?25[lh]|[12]?[AK])|\r", "", text.getvalue())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_shown_by_its_name(written, name):
    bar = Bar()
    bar.start(name, 10, 0)
    bar.advance(3, 0.25)
    bar.say(name)
    bar.stop()
    assert NAMES[name] in shown(written)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown(written))


@pytest.mark.parametrize("name", NAMES)
def test_a_study_and_its_runs_are_shown_by_their_names(written, name, tmp_path):
    bar, settings = StudyBar(), Settings(task="cola", out=tmp_path / "run")
    bar.labels = {settings.folder.name: name}
    bar.open(f"study {name}", runs=2, done=0, rows=20)
    bar.begin(settings)
    bar.start("", 10, 0)
    bar.advance(4, 0.5)
    bar.elsewhere(f"on {name}", 4, 10)
    bar.finished(settings, ValueError(name), 10)
    bar.close()
    text = shown(written)
    assert f"{NAMES[name]}  failed: {NAMES[name]}" in text
    assert f"on {NAMES[name]}" in text
    assert f"study {NAMES[name]}" in text or not bar.console.is_terminal
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
