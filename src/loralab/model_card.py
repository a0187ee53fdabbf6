"""The model card of an adapter: README.md in its folder, which says what it is, which base it wants and how to use it.

Every save writes one from what the adapter knows; a run writes a longer one in its place (run/card.py).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from loralab.disk import write_text
from loralab.files import AdapterFile

FILE = "README.md"
PARTS = ("adapter", "head")  # of the counts
OWN = '---\nlibrary_name: "loralab"\n'  # how a card begins that loralab may replace


def render(
    title: str,
    about: str,
    use: Sequence[str],
    facts: Mapping[str, str],
    base: str,
    method: str,
    licence: str = "",
    rest: Sequence[str] = (),
) -> str:
    """Return the text of a card: front matter, a sentence, its use in Python, a table of facts, and other lines."""
    front = {"base_model": base, "license": licence or "unknown", "tags": [*dict.fromkeys(("lora", method))]}
    lines = [OWN + "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())]
    lines += ["---", "", f"# {title}", "", about, "", "```python", *use, "```", "", "| what | is |", "| --- | --- |"]
    lines += [f"| {key} | {cell(text)} |" for key, text in facts.items()]
    return "\n".join([*lines, *rest]) + "\n"


def cell(text: str) -> str:
    """Return a text as a cell of a table in Markdown."""
    return " ".join(text.replace("|", "\\|").split())


def write(file: AdapterFile, folder: Path) -> None:
    """Write the card of a saved adapter, unless the folder has a README of somebody's own. Raises OSError."""
    path = folder / FILE
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(OWN):
        return
    write_text(path, card(file))


def card(file: AdapterFile) -> str:
    """Return the card of an adapter, from what its folder knows."""
    name, kind = str(file.base.get("name")), str(file.base.get("class"))
    factors = file.recipe.factors
    settings = {key: getattr(factors, key) for key in ("rank", "alpha") if hasattr(factors, key)}
    facts = {
        "base": f"{name} ({kind}), sha256 of its tensors {file.base.get('sha256')}",
        "method": ", ".join([type(factors).__name__, *(f"{key} {value:g}" for key, value in settings.items())])
        if factors is not None
        else "no layer is adapted",
        "layers": f"{len(file.paths)}: {', '.join(file.coverage)}" if file.paths else "none",
        "labels": ", ".join(file.labels[:40]) or "none",
        "values that learn": "{:,} in the adapter, {:,} in the head".format(*(file.counts.get(k, 0) for k in PARTS)),
        "licence": "not stated",
    }
    method = type(factors).__name__.lower() if factors is not None else "head"
    return render(file.name, f"An adapter over {name}, made with loralab.", _use(file, name, kind), facts, name, method)


def _use(file: AdapterFile, name: str, kind: str) -> list[str]:
    """Lines of Python that put the adapter on its base."""
    if file.base.get("model_type") is None:
        return ["import loralab", f"model = ...  # the {kind} that it was trained on",
                'adapters = loralab.load(model, "path/to/this/folder")']  # fmt: skip
    outputs = f", num_labels={len(file.labels)}" if file.heads and file.labels else ""
    return [
        "import loralab, transformers",
        f"model = transformers.{kind}.from_pretrained({json.dumps(name)}{outputs})",
        'adapters = loralab.load(model, "path/to/this/folder")',
    ]
