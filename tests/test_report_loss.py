"""The report of scores of which less is better: loss and perplexity."""

import json
import re

import numpy as np
import pytest
import synthetic

from loralab.data.metrics import LOWER_IS_BETTER
from loralab.report import charts as ch
from loralab.report import findings, planned_charts
from loralab.report.style import styled


def mirrored(folder, name):
    """The runs of a folder with each score turned: 3 - score, of a metric where less is better."""

    def turned(scores):
        return scores and {name: 3 - next(iter(scores.values()))}

    for file in folder.glob("*/result.json"):
        result = json.loads(file.read_text())
        scores = {key: 3 - value for key, value in result["metric"].items() if key != "name"}
        result |= {"metric": {"name": name, **scores}, "metrics": turned(result["metrics"])}
        file.write_text(json.dumps(result))
        history = file.with_name("metrics.jsonl")
        rows = [json.loads(line) for line in history.read_text().splitlines()]
        rows = [row | {key: turned(row[key]) for key in ("held_out", "validation")} for row in rows]
        history.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", sorted(LOWER_IS_BETTER))
def test_pictures_of_a_loss_show_what_those_of_its_mirrored_score_show(tmp_path, monkeypatch, name):
    """The same methods are best, on the front, cut off as far worse; the axis has the loss itself and says its way."""
    monkeypatch.setattr(ch, "MANY", 5)
    monkeypatch.setattr(ch, "BEST", 3)
    monkeypatch.setitem(synthetic.GOOD, "head", -1.0)
    seen = {}
    for which in ("score", "loss"):
        study = synthetic.planned(tmp_path / which, 3, ("cola",), ("full", "lora", "dora", "lora-fa", "qlora", "head"))
        for file in study.glob("store/*/predictions.safetensors"):  # of classes, which have no loss
            file.unlink()
        if which == "loss":
            mirrored(study / "store", name)
        found = findings.findings(findings.read(study))
        results, styles = found.results, ch.styles_of(found.methods)
        rows = ch.intervals(results, styles)[-1]
        with styled():
            caption, rates = planned_charts.rates(results, styles)
        cost = ch.against("trainable parameters")(results, styles)[-1]
        (ax,), (ax_cost,) = rows.axes, cost.axes
        arrows = [line for line in ax.lines if line.get_marker() in "<>" and line.get_markersize() == 6]
        at = np.array([line.get_xydata()[0] for line in arrows])  # (arrows, 2)
        shown = rates.axes[0].lines[0].get_ydata()
        seen[which] = {
            "few": [r.label for r in ch.few(results)[0]],
            "outliers": [[r.label for r in part] for part in ch.outliers(results, results[0].summary.metric)],
            "front": [text.get_text() for text in cost.legends[0].get_texts()],
            "hidden rates": re.findall(r"Off the scale: ([^,]+)", caption),
            "arrows": at[:, 1].tolist(),
            "arrow side": (at[:, 0] if which == "score" else 1 - at[:, 0]).tolist(),
            "rates": (shown if which == "score" else 3 - shown).tolist(),
        }
        lower = " (lower is better)" * (which == "loss")
        assert ax.get_xlabel() == ax_cost.get_ylabel() == (name if lower else "Matthews") + lower
    assert seen["loss"].pop("arrow side") == pytest.approx(seen["score"].pop("arrow side"))
    assert seen["loss"].pop("rates") == pytest.approx(seen["score"].pop("rates"))
    assert seen["loss"] == seen["score"]
    assert seen["score"]["arrows"]
    assert seen["score"]["outliers"][1] == ["head"]
