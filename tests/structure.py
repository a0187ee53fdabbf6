"""How the package is built: `python tests/structure.py` prints it as Markdown, `--svg FILE` draws its storeys.

Storeys are the layers that pyproject.toml gives import-linter; a checkout without them is listed by top-level module.
PYTHONPATH=OTHER/src prints another checkout.
"""

import argparse
import ast
import contextlib
import io
import os
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import grimp
import networkx

import loralab

PACKAGE = Path(loralab.__file__).parent
Storeys = list[list[str]]  # from the top down, the top-level modules of each


# ---- files -----------------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(file: Path) -> str:
    """The top-level module that a file belongs to; loralab itself is __init__."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def function_lengths() -> list[int]:
    """Lines of every function and method, decorators left out."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    trees = (ast.parse(file.read_text()) for file in sources())
    return [n.end_lineno - n.lineno + 1 for tree in trees for n in ast.walk(tree) if isinstance(n, kinds)]


# ---- imports ---------------------------------------------------------------------------------------------------------


def contracts() -> list[dict[str, Any]]:
    """The contracts of import-linter in the checkout's pyproject.toml."""
    config = PACKAGE.parents[1] / "pyproject.toml"
    tool = tomllib.loads(config.read_text()).get("tool", {}) if config.is_file() else {}
    return list(tool.get("importlinter", {}).get("contracts", ()))


def storeys() -> Storeys | None:
    """The layers of the contract; None where there is none."""
    layers = next((contract["layers"] for contract in contracts() if contract["type"] == "layers"), None)
    return None if layers is None else [[name.strip() for name in layer.split("|")] for layer in layers]


def workbench() -> set[str]:
    """The top-level modules that the library must not import, by the contract of pyproject.toml; empty without one."""
    forbidden = [contract for contract in contracts() if contract["type"] == "forbidden"]
    return {name.split(".")[1] for contract in forbidden for name in contract["forbidden_modules"]}


def import_graph() -> Any:
    """A networkx graph of the package's modules, an edge for each import of one by another."""
    found = grimp.build_graph("loralab", cache_dir=None)
    graph = networkx.DiGraph()
    graph.add_nodes_from(found.modules)
    for module in found.modules:
        graph.add_edges_from((module, other) for other in found.find_modules_directly_imported_by(module))
    return graph


def units_of(graph: Any) -> Any:
    """The same between top-level modules, `count` imports on each edge."""
    small = networkx.DiGraph()
    top = {module: ([*module.split("."), "__init__"])[1] for module in graph}
    small.add_nodes_from(set(top.values()) - {"__init__", "__main__"})
    for importer, imported in graph.edges:
        a, b = top[importer], top[imported]
        if a != b and "__init__" not in (a, b) and "__main__" not in (a, b):
            small.add_edge(a, b, count=small.get_edge_data(a, b, {"count": 0})["count"] + 1)
    return small


def rings(graph: Any) -> list[int]:
    """The number of modules in each ring, the largest first."""
    return sorted((len(ring) for ring in networkx.strongly_connected_components(graph) if len(ring) > 1), reverse=True)


def upward(units: Any, layers: Storeys) -> int:
    """Imports of a higher storey, or between modules of one storey."""
    floor = {name: i for i, layer in enumerate(layers) for name in layer}
    return sum(data["count"] for a, b, data in units.edges(data=True) if floor[a] >= floor[b])


def downward_order(units: Any) -> Storeys:
    """An order of top-level modules in which few imports run upward; the modules of a ring are one storey."""
    groups = networkx.condensation(units)
    rank = {name: units.in_degree(name) - units.out_degree(name) for name in units}
    return [sorted(groups.nodes[node]["members"], key=rank.get) for node in networkx.topological_sort(groups)]


# ---- what one command crosses ----------------------------------------------------------------------------------------


def crossed(action: Callable[[], object]) -> tuple[int, int]:
    """(files of the package in which a function was called, changes from one of them to another)."""
    files: list[str] = []

    def profile(frame: Any, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(PACKAGE)) and (not files or files[-1] != name):
            files.append(name)

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return len(set(files)), len(files) - 1


def traces(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(command, files, changes) of a training run and of loading its adapter, all modules being imported before."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from loralab.cli import main

    torch.set_num_threads(1)
    tiny_model(folder / "tiny")
    rows = [f"the {pet} sees {i},{pet}" for i in range(60) for pet in ("cat", "dog")]
    (folder / "pets.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")

    def train(out: str) -> Callable[[], object]:
        flags = {"task": "pets.csv", "text": "sentence", "label": "label", "model": "tiny", "max-length": 16,
                 "epochs": 1, "batch-size": 20, "out": out}  # fmt: skip
        return lambda: main(["train", *(str(part) for key, value in flags.items() for part in (f"--{key}", value))])

    def load() -> object:
        with torch.random.fork_rng():
            model = AutoModelForSequenceClassification.from_pretrained("tiny", num_labels=2)
        return loralab.load(model, Path("second/adapter"))

    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train("first")()  # imports everything
        yield "loralab train", *crossed(train("second"))
        load()
        yield "loralab.load", *crossed(load)


def tiny_model(folder: Path) -> None:
    """A BERT of a few thousand values with a word tokenizer, as a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, "the", "cat", "dog", "sees"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    sizes = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    BertModel(BertConfig(**sizes, intermediate_size=37, max_position_embeddings=40)).save_pretrained(folder)


# ---- output ----------------------------------------------------------------------------------------------------------


def markdown(graph: Any, layers: Storeys | None, found: list[tuple[str, int, int]]) -> str:
    units, files = units_of(graph), sources()
    order = layers or downward_order(units)
    total = f"{len(files)} files, {sum(map(lines, files)):,} lines"
    modules, tops = rings(graph), rings(units)
    facts = [
        ("files and lines", total),
        ("rings of files (files in each)", f"{len(modules)} ({', '.join(map(str, modules))})" if modules else "0"),
        ("rings of top-level modules", f"{len(tops)} ({', '.join(map(str, tops))})" if tops else "0"),
        ("imports of a higher storey", "no storeys" if layers is None else str(upward(units, layers))),
        ("median function, lines", f"{median(function_lengths()):g}"),
        ("functions above 40 lines", str(sum(length > 40 for length in function_lengths()))),
        ("files above 500 lines", str(sum(lines(file) > 500 for file in files))),
        *((f"`{name}`: files crossed, changes of file", f"{count}, {changes:,}") for name, count, changes in found),
    ]
    rows = [f"| {name} | {value} |" for name, value in facts]
    return "\n".join(["| what | now |", "| --- | ---: |", *rows, "", *by_storey(units, order)])


def by_storey(units: Any, order: Storeys) -> list[str]:
    """A row a storey: its files, lines, and the storeys that it imports."""
    size: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for file in sources():
        size[unit(file)] += lines(file)
        count[unit(file)] += 1
    rows = ["| storey | files | lines | imports (times) |", "| --- | ---: | ---: | --- |"]
    for names in order:
        targets: Counter[str] = Counter()
        for name in names:
            for _, other, data in units.out_edges(name, data=True) if name in units else ():
                targets[other] += data["count"]
        arrows = ", ".join(f"{other} {n}" for other, n in targets.most_common())
        cells = (" \\| ".join(names), sum(count[n] for n in names), f"{sum(size[n] for n in names):,}", arrows)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


LINE, GAP, LETTERS = 15, 15, 31  # of the drawing: height of a line, what is added for a storey, letters of a line
LEFT, BOX, RIGHT = 120, 250, 400  # room for words, the box of a storey, room for arcs
DOWN, UP, EDGE, INK, MUTED = "#2f6fde", "#c4366f", "#aab4bf", "#1c2530", "#5d6975"
COLORS = {True: "#fdf0d5", False: "#eef2f7"}  # workbench, library
EVERYWHERE = "errors"  # every storey may import it, so it has no arcs


def svg(units: Any, order: Storeys, workbench: set[str]) -> str:
    """Storeys as boxes from the top down; imports as arcs, thicker the more there are: right down, left (red) up."""
    floor = {name: i for i, names in enumerate(order) for name in names}
    between: Counter[tuple[int, int]] = Counter()
    for a, b, data in units.edges(data=True):
        if b != EVERYWHERE:
            between[floor[a], floor[b]] += data["count"]
    size: Counter[str] = Counter()
    for file in sources():
        size[unit(file)] += lines(file)
    labels = [_wrapped(names) for names in order]
    tops = [20 + sum(LINE * len(label) + GAP for label in labels[:i]) for i in range(len(labels) + 1)]
    width, height = LEFT + BOX + RIGHT, tops[-1] + 20
    box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', '<rect width="100%" height="100%" fill="#ffffff"/>']
    middles = [(top + end - GAP / 2) / 2 for top, end in pairwise(tops)]
    for (a, b), n in sorted(between.items(), key=lambda item: item[1]):
        title = f"{' | '.join(order[a])} imports {' | '.join(order[b])}: {n}"
        parts.append(_arc(middles[a], middles[b], a < b, n, title))
    for i, names in enumerate(order):
        y, fill = tops[i], COLORS[bool(workbench & set(names))]
        tall = LINE * len(labels[i]) + 7
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{BOX}" height="{tall}" rx="4" fill="{fill}" stroke="{EDGE}"/>')
        parts += [
            f'<text x="{LEFT + 8}" y="{y + LINE * j}" fill="{INK}">{line}</text>' for j, line in enumerate(labels[i], 1)
        ]
        parts.append(
            f'<text x="{LEFT + BOX - 8}" y="{y + LINE}" fill="{MUTED}" text-anchor="end">'
            f"{sum(size[name] for name in names):,}</text>"
        )
    for text, inside in (("workbench", True), ("library", False)) if workbench else ():
        rows = [i for i, names in enumerate(order) if bool(workbench & set(names)) == inside]
        parts.append(f'<text x="8" y="{tops[rows[0]] + LINE}" fill="{MUTED}">{text}</text>')
    note = f"arcs: imports, blue down, red up; numbers: lines; imports of {EVERYWHERE} are not drawn"
    parts.append(f'<text x="{LEFT}" y="{height - 6}" fill="{MUTED}" font-size="11">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _wrapped(names: Sequence[str]) -> list[str]:
    """The names of a storey in lines that fit its box."""
    found = [names[0]]
    for name in names[1:]:
        longer = f"{found[-1]} | {name}"
        found[-1:] = [longer] if len(longer) <= LETTERS else [found[-1], name]
    return found


def _arc(y: float, to: float, down: bool, n: int, title: str) -> str:
    x = LEFT + BOX if down else LEFT
    reach = min(
        14 + abs(to - y) / 2, RIGHT * 4 / 3 - 10
    )  # a curve goes three quarters of the way to its control points
    bend = x + (reach if down else -reach)
    stroke = f'stroke="{DOWN if down else UP}" stroke-width="{0.6 + 0.25 * min(n, 16):.2f}" opacity="0.45"'
    path = f"M{x} {y:g} C{bend:g} {y:g} {bend:g} {to:g} {x} {to:g}"
    return f'<path d="{path}" fill="none" {stroke}><title>{title}</title></path>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--svg", type=Path, help="write a drawing of the storeys to this file instead")
    parser.add_argument("--no-trace", action="store_true", help="leave out what needs a training run")
    given = parser.parse_args()
    graph, layers = import_graph(), storeys()
    if given.svg:
        units = units_of(graph)
        order = layers or [[name] for names in downward_order(units) for name in names]
        given.svg.write_text(svg(units, order, workbench()))
        return
    found: list[tuple[str, int, int]] = []
    if not given.no_trace:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with tempfile.TemporaryDirectory() as folder:
            found = list(traces(Path(folder)))
    print(markdown(graph, layers, found))


if __name__ == "__main__":
    main()
