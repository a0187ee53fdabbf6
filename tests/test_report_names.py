"""Names of methods, tasks and models in pictures: they stand there as they are, whatever matplotlib takes them for."""

import html
import json
import re
from collections import Counter

import pytest
import synthetic

from loralab.analysis import Spectrum
from loralab.report import adapter_charts, write
from loralab.report.style import svg

NAMES = [r"$\undefined$", "$5or$10", "$x_{$", "_hidden", r"a^b_{c}"]
PLAIN = "plain"


def texts(drawn):
    """Each text of pictures, and how often it is there."""
    found = re.findall(r"<text[^>]*>(.*?)</text>", drawn, re.DOTALL)
    return Counter(html.unescape(re.sub(r"<[^>]*>", "", text)).strip() for text in found)


def texts_of(folder, name):
    """The texts of the pictures of a study whose method, task and model have such names, and the files of them."""
    renamed = {"full": name, "cola": f"{name}1", "mpnet": f"{name}2"}
    study = synthetic.planned(folder, seeds=2, tasks=("cola",), methods=("lora", "full"))
    data = json.loads((study / "study.json").read_text())
    for entry in data["planned"]:
        for key in ("task", "model", "method"):
            entry[key] = renamed.get(entry[key], entry[key])
    (study / "study.json").write_text(json.dumps(data))
    page = write(study, folder / "report")
    return texts(page.read_text()), sorted((folder / "report/plots").glob("*.png"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return texts_of(tmp_path_factory.mktemp("plain"), PLAIN)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_has_names_as_they_are_and_leaves_none_out(plain, tmp_path, name):
    found, files = texts_of(tmp_path, name)
    expected, others = plain
    assert found == Counter({text.replace(PLAIN, name): count for text, count in expected.items()})
    assert len(files) == len(others)
    assert found[name] > 2


def test_the_numbers_of_a_logarithmic_axis_are_numbers():
    found = [Spectrum("layer.$a_b", (64, 70), [1.0 / (i + 1) for i in range(64)], 1.0, 1.0, 8.0)]
    assert {"1", "10", "layers"} <= set(texts(svg(adapter_charts.spectra(found), "x")))
