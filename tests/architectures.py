"""Every architecture of tests/zoo.py through everything an adapter does; `--write FILE` makes the page of the table.

Each model is tried in float64 with an adapter on every layer that can be adapted: linear layers, embeddings,
convolutions and stacks of experts. The oracle is torch alone: the plain model, called with W + s B A in the place of
every W, by `torch.func.functional_call`; it gives the right outputs and the right gradients. A cell is `exact` (to
1e-8 of the largest value, 1e-5 where a file in float32 or PEFT is between), or says why not.
"""

import argparse
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import loralab
from loralab import kinds
from loralab.coverage import ADAPTED, LEFT, UNREACHABLE
from loralab.heads import head_of
from loralab.reach import parts
from loralab.read_past import is_read_past
from loralab.targets import layer_at

EXACT, NARROW = 1e-8, 1e-5
RANK, ALPHA = 2, 3.0
COLUMNS = ("coverage", "forward", "backward", "merge", "save and load", "PEFT reads ours", "we read PEFT's", "generate")
NOT_OURS = "not generated"  # a model that writes nothing


class Wrong(Exception):
    """A cell that is not exact."""


def first_output(out: Any) -> Tensor:
    """What a model answers: logits, or the last hidden state."""
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if isinstance(out.get(name), Tensor):
            return out[name]  # type: ignore[no-any-return]
    raise Wrong(f"no output among {list(out)}")


def near(one: Tensor, other: Tensor, tolerance: float) -> None:
    """Raise Wrong unless two tensors are alike, to a share of the largest value."""
    off = (one - other).abs().max().item()
    if one.shape != other.shape or not off <= tolerance * max(other.abs().max().item(), 1e-3):
        raise Wrong(f"off by {off:.1e} of {other.abs().max().item():.1e}")


def reachable(model: nn.Module) -> list[str]:
    """Paths of every layer that can be adapted and has a weight of its own."""
    found = parts(model, head_of(model))
    return [part.path for part in found if part.is_layer and part.obstacle is None and part.shared is None]


def by_peft(model: nn.Module, name: str) -> list[str]:
    """Those that PEFT adapts rightly in every architecture: linear layers and the embedding of the input.

    Where the model reads a weight itself, PEFT leaves its adapter out. Of a model without linear layers convolutions.
    """
    try:
        words = model.get_input_embeddings()
    except NotImplementedError:  # a model of images
        words = None
    layers = {path: layer_at(model, path) for path in reachable(model) if not is_read_past(model, path)}
    layers = {path: layer for path, layer in layers.items() if not path.endswith(zoo.ROWS[name].not_peft or ("-",))}
    found = [
        p for p, layer in layers.items() if kinds.is_product(layer) or (type(layer) is nn.Embedding and layer is words)
    ]
    return found or [path for path, layer in layers.items() if isinstance(layer, kinds.CONVOLUTIONS)]


def shake(adapters: Any) -> None:
    """Move every tensor of the adapter off its start, in float64."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role, tensor in adapters.tensors().values():
            if role != "head":
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


class Case:
    """One architecture, and what is computed of it once."""

    def __init__(self, name: str) -> None:
        self.name, self.row = name, zoo.ROWS[name]
        self.inputs = zoo.INPUTS[self.row.inputs]()

    def answer(self, model: nn.Module) -> Tensor:
        """The output of a model for the row's inputs."""
        return first_output(model(**self.inputs))

    def attached(self, **more: Any) -> tuple[nn.Module, Any]:
        """A fresh model with a moved adapter on everything that can be reached."""
        model = zoo.build(self.name)
        given = {"rank": RANK, "alpha": ALPHA, "targets": reachable(model), **more}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapters = loralab.attach(model, "lora", **given)
        model.double()
        shake(adapters)
        return model, adapters

    @cached_property
    def adapted(self) -> tuple[nn.Module, Any]:
        """The adapted model that most cells ask."""
        return self.attached()

    # ---- the cells -----------------------------------------------------------------------------------------------

    def coverage(self) -> str:
        """Shares of the values, all-linear; every parameter of the backbone is counted once."""
        model = zoo.build(self.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            coverage = loralab.attach(model, "lora", rank=RANK).coverage()
        plain = zoo.build(self.name)
        outside = head_of(plain)
        counted = {
            id(p): p.numel()
            for key, p in plain.named_parameters()
            if not any(key == path or key.startswith(path + ".") for path in outside)
        }
        if coverage.size != sum(counted.values()):
            raise Wrong(f"{coverage.size} values of {sum(counted.values())}")
        shares = [coverage.share(state) for state in (ADAPTED, LEFT, UNREACHABLE)]
        return " / ".join(f"{100 * share:.0f}" for share in shares)

    def oracle(self, adapters: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(output, gradient of every A and B) by autograd through dense weights of the plain model."""
        plain = zoo.build(self.name)
        learned = {key: t.detach().clone().requires_grad_() for key, t in adapters.state().items()}
        weights = {}
        for path in adapters.spec().paths:
            layer = layer_at(plain, path)
            A, B = learned[f"{path}.A"], learned[f"{path}.B"]
            rank = A.shape[-2]
            D = (ALPHA / rank) * torch.einsum("...or,...ri->...oi", B, A)
            if isinstance(layer, kinds.stack.Stack):
                key, W = path, layer.weight.detach()
                D = D.transpose(1, 2) if layer.transposed else D
            else:
                key, W = f"{path}.weight", layer.weight.detach()
                turned = isinstance(layer, nn.Embedding | Conv1D)  # (in, out)
                D = D.T if turned else D.reshape(W.shape)
            weights[key] = W + D
        out = first_output(functional_call(plain, weights, kwargs=self.inputs, tie_weights=False))
        self.loss(out).backward()
        return out.detach(), {key: t.grad for key, t in learned.items() if t.grad is not None}

    @staticmethod
    def loss(out: Tensor) -> Tensor:
        """A number that depends on every value of an output in another way."""
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
        return (weights * out).sum()

    @cached_property
    def right(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What the oracle says of the adapted model."""
        return self.oracle(self.adapted[1])

    def forward(self) -> str:
        """The output of the adapted model against the oracle's."""
        right = self.right[0]
        with torch.no_grad():
            near(self.answer(self.adapted[0]), right, EXACT)
        return "exact"

    def backward(self) -> str:
        """The gradient of every tensor that learns against the oracle's."""
        model, adapters = self.adapted
        self.loss(self.answer(model)).backward()
        state = adapters.state()
        found = {key: t.grad for key, t in state.items() if t.grad is not None}
        largest = max(g.abs().max().item() for g in self.right[1].values())
        for key, right in self.right[1].items():
            if key not in found and right.abs().max() > 0:
                raise Wrong(f"{key} has no gradient")
            if key in found and (found[key] - right).abs().max().item() > EXACT * largest:
                raise Wrong(f"{key} is off by {(found[key] - right).abs().max().item():.1e} of {largest:.1e}")
        return "exact"

    def merge(self) -> str:
        """The merged model, also saved and read again, against the adapted one."""
        model, adapters = self.adapted
        plain = adapters.merge()
        with torch.no_grad():
            near(self.answer(plain), self.answer(model), EXACT)
            with tempfile.TemporaryDirectory() as folder:
                plain.save_pretrained(folder)
                again = type(plain).from_pretrained(folder).double().eval()
                again.config._experts_implementation = "eager"
                near(self.answer(again), self.answer(plain), NARROW)
        return "exact"

    def saved(self) -> str:
        """The adapter, saved and loaded onto a fresh model."""
        model, adapters = self.adapted
        with tempfile.TemporaryDirectory() as folder:
            adapters.save(folder)
            fresh = zoo.build(self.name)
            loralab.load(fresh, folder)
        fresh.double()
        with torch.no_grad():
            near(self.answer(fresh), self.answer(model), NARROW)
        return "exact"

    def peft_reads(self) -> str:
        """PEFT's model of what we export, on the kinds of layers that PEFT adapts by module."""
        import peft

        model, adapters = self.attached(targets=by_peft(zoo.build(self.name), self.name))
        with tempfile.TemporaryDirectory() as folder:
            adapters.export(folder)
            theirs = peft.PeftModel.from_pretrained(zoo.build(self.name), folder).double().eval()
        with torch.no_grad():
            near(self.answer(theirs.base_model.model), self.answer(model), NARROW)
        return "exact"

    def peft_writes(self) -> str:
        """What PEFT saves of its own adapter, loaded here."""
        import peft

        plain = zoo.build(self.name)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=by_peft(plain, self.name), init_lora_weights=False
        )
        theirs = peft.get_peft_model(plain, config).double().eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder, save_embedding_layers=False)
            fresh = zoo.build(self.name)
            loralab.load(fresh, folder)
        fresh.double()
        with torch.no_grad():
            near(self.answer(fresh), self.answer(theirs.base_model.model), NARROW)
        return "exact"

    def generate(self) -> str:
        """Greedy tokens of the adapted model against those of the merged one."""
        model, adapters = self.adapted
        if not (hasattr(model, "can_generate") and model.can_generate()):
            return NOT_OURS
        given = {key: t for key, t in self.inputs.items() if not key.startswith("decoder_")}
        ours, plain = (
            m.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False) for m in (model, adapters.merge())
        )
        if not torch.equal(ours, plain):
            raise Wrong("other tokens than the merged model")
        return "exact"


CELLS: dict[str, Callable[[Case], str]] = dict(
    zip(
        COLUMNS,
        (
            Case.coverage, Case.forward, Case.backward, Case.merge, Case.saved, Case.peft_reads, Case.peft_writes,
            Case.generate,
        ),
        strict=True,
    )
)  # fmt: skip


def cells(name: str) -> dict[str, str]:
    """Column -> `exact`, a share, or why not."""
    case, found = Case(name), {}
    for column, cell in CELLS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[column] = cell(case)
            except loralab.UserError as error:
                found[column] = f"refused: {error}"
            except Wrong as error:
                found[column] = f"WRONG: {error}"
            except ValueError as error:
                refusal = str(error).startswith("[PEFT")
                found[column] = f"refused by PEFT: {error}" if refusal else f"FAILED: {error}"
            except Exception as error:
                found[column] = (
                    f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
                )
    return found


def is_right(cell: str) -> bool:
    """Whether a cell is exact, shares of coverage that add up, or for a model that writes nothing."""
    return cell in ("exact", NOT_OURS) or re.fullmatch(r"\d+ / \d+ / \d+", cell) is not None


def main() -> None:
    """Try the named architectures, or all, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; by default all")
    parser.add_argument("--write", type=Path, help="the page to write")
    given = parser.parse_args()
    table = {}
    for name in given.names or zoo.ROWS:
        table[name] = cells(name)
        odd = {column: cell for column, cell in table[name].items() if cell[:1].isupper() or cell.startswith("refused")}
        print(name, table[name]["coverage"], odd or "exact", file=sys.stderr)
    if given.write:
        given.write.write_text(page(table))


def page(table: dict[str, dict[str, str]]) -> str:
    """The page of a table."""
    reasons: dict[str, int] = {}
    lines = []
    for name, row in table.items():
        shown = []
        for column in COLUMNS:
            cell = row[column]
            if cell.startswith(("refused", "WRONG", "FAILED")):
                cell = f"[{reasons.setdefault(re.sub(r'[.][0-9]+[.]', '.*.', cell), len(reasons) + 1)}]"
            shown.append({"exact": "exact", NOT_OURS: "-"}.get(cell, cell))
        lines.append(f"| {name} | {zoo.ROWS[name].family} | {' | '.join(shown)} |")
    all_cells = [cell for row in table.values() for cell in row.values() if cell != NOT_OURS]
    exact, tried = sum(is_right(cell) for cell in all_cells), len(all_cells)
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items()) or "None."
    head = " | ".join(COLUMNS)
    return PAGE.format(
        count=len(table), exact=exact, tried=tried, head=head, rule="|".join(["---"] * (len(COLUMNS) + 2)),
        lines="\n".join(lines), notes=notes, version=zoo.transformers.__version__,
    )  # fmt: skip


PAGE = """# Architectures

`make architectures` makes this page; `make test` tries a few rows of each family again.

{count} architectures of transformers {version}, at toy size with random weights, in float64. The adapter is on every
layer that can be adapted: linear layers, embeddings, convolutions, stacks of experts. {exact} of {tried} cells are
exact.

- *coverage*: percent of the values of the backbone that all-linear adapts / leaves alone / cannot reach. Every
  parameter is counted once.
- *forward*, *backward*: against autograd through the plain model with dense weights W + s B A.
- *merge*: the merged model, and the merged model saved and read by `from_pretrained`, against the adapted one.
- *save and load*: the adapter's folder on a fresh model. *PEFT reads ours*, *we read PEFT's*: folders both ways, of an
  adapter on linear layers and the input's embedding. Layers whose weight the model reads itself are left out there, as
  PEFT does not adapt what is read.
- *generate*: greedy tokens of the adapted and of the merged model; - where a model writes nothing.

A number in brackets is a refusal, with its reason below.

| architecture | family | {head} |
|{rule}|
{lines}

## Refusals

{notes}
"""

if __name__ == "__main__":
    main()
