"""A few architectures of each family through every cell of docs/architectures.md, and the page itself."""

import re
from pathlib import Path

import architectures
import pytest
import zoo

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
SHORT = [
    *("deberta-v2", "albert", "gemma2", "bloom", "gpt2", "qwen2_moe", "mamba"),
    *("t5", "marian", "siglip_vision_model", "swin", "whisper", "wavlm", "clip"),
]


@pytest.mark.few(5)
@pytest.mark.parametrize("name", SHORT)
def test_every_cell_of_an_architecture_is_exact(name):
    wrong = {column: cell for column, cell in architectures.cells(name).items() if not architectures.is_right(cell)}
    assert wrong == {}


def test_an_update_of_another_weight_is_seen(monkeypatch):
    """The cells can fail: with another scaling than the oracle's, forward and backward are wrong."""
    monkeypatch.setattr(architectures, "ALPHA", 3.1)
    case = architectures.Case("bert")
    _ = case.adapted
    monkeypatch.setattr(architectures, "ALPHA", 3.0)
    for cell in (case.forward, case.backward):
        with pytest.raises(architectures.Wrong):
            cell()


def test_the_page_has_every_architecture_and_few_refusals():
    text = PAGE.read_text()
    rows = re.findall(r"^\| ([\w-]+) \| [^|]+ \| (.*) \|$", text, re.MULTILINE)
    assert {name for name, _ in rows if name != "architecture"} == set(zoo.ROWS)
    assert len(zoo.ROWS) >= 55
    cells = [cell.strip() for name, row in rows if name != "architecture" for cell in row.split("|")]
    assert len(cells) == len(zoo.ROWS) * len(architectures.COLUMNS)
    assert sum(cell.startswith("[") for cell in cells) < len(cells) / 10
    assert "WRONG" not in text
    assert "FAILED" not in text
    assert all(cell in ("exact", "-") or cell[0] == "[" or "/" in cell for cell in cells)
