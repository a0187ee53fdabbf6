"""Names of models: near aliases, and an answer within a second where the hub cannot be reached."""

import socket
import threading
import time
from pathlib import Path

import pytest

from loralab import model_names
from loralab.errors import UserError


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("minlim", "minilm"),
        ("MiniLM", "minilm"),
        ("sentence-transformers/all-MiniLM-L6-v2", "minilm"),
        ("all-mpnet-base-v2", "mpnet"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2"),
        ("./models/minilm/", "minilm"),
        ("roberta-base", None),
        ("gpt2", None),
    ],
)
def test_the_alias_that_was_meant(name, alias):
    assert model_names.alias_hint(name) == (f" (did you mean the alias {alias!r}?)" if alias else "")


@pytest.fixture
def online(monkeypatch):
    """As if nobody had set HF_HUB_OFFLINE, and no proxy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model_names, "getproxies", dict)


def _hang(*_args, **_kwargs):
    threading.Event().wait(3)
    raise OSError("it never answered")


def _no_name(*_args, **_kwargs):
    raise OSError(-2, "Name or service not known")


@pytest.mark.parametrize(("network", "told"), [(_hang, "did not answer"), (_no_name, "Name or service not known")])
def test_a_hub_that_cannot_be_reached_is_told_within_a_second(online, monkeypatch, network, told):
    monkeypatch.setattr(socket, "create_connection", network)
    before = time.perf_counter()
    with pytest.raises(UserError, match=f"no folder 'nobody/nothing' and the hub cannot be reached .*{told}"):
        model_names.require("nobody/nothing")
    assert time.perf_counter() - before < 1.0


def test_the_host_that_is_asked_is_the_proxy_where_there_is_one(online, monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    assert model_names.unreachable() is None
    for proxy in ("http://proxy.example:3128", "proxy.example:3128"):
        monkeypatch.setattr(model_names, "getproxies", lambda proxy=proxy: {"https": proxy})
        assert model_names.unreachable() is None
    assert asked == [("huggingface.co", 443), ("proxy.example", 3128), ("proxy.example", 3128)]


def test_what_is_here_asks_nobody(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(model_names, "unreachable", _hang)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--some--bert").mkdir()
    model_names.require(str(tiny))
    model_names.require("some/bert")


def test_other_tools_are_told_the_hub_name_of_an_alias_and_it_is_the_alias_again_here(monkeypatch):
    there, cached = {"minilm"}, set()
    monkeypatch.setattr(model_names, "find", lambda alias: Path("model") if alias in there else None)
    monkeypatch.setattr(model_names, "is_cached", lambda name: name in cached)
    for alias, row in model_names.ALIASES.items():
        assert model_names.HUB_NAME.fullmatch(row.hub)
        assert model_names.hub_name(alias) == row.hub
        assert model_names.here(row.hub) == (alias if alias in there else row.hub)
    cached.add(model_names.ALIASES["minilm"].hub)
    assert model_names.here(model_names.ALIASES["minilm"].hub) == model_names.ALIASES["minilm"].hub
    assert model_names.here("some/model") == model_names.hub_name("some/model") == "some/model"
