"""Upload an adapter folder to the hub: the files of a list and no others, and nothing that names this machine."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loralab import files, gguf_format, model_card, peft_format
from loralab.disk import read_json, read_metadata
from loralab.errors import UserError
from loralab.schema import checked, listed

TEMPLATE = "chat_template.jinja"  # of an export whose adapter was trained with a template of its own
FILES = (  # what may leave; rows, predictions and records of a run are none of these
    files.TENSORS, files.HEADER, files.TASK, peft_format.TENSORS, peft_format.HEADER, gguf_format.ADAPTER,
    model_card.FILE, TEMPLATE,
)  # fmt: skip
BASE_KEYS = ("base", "name", "base_model_name_or_path")  # where files name a base: no path, whether it is here or not


def files_of(folder: Path | str) -> list[Path]:
    """Return the files of an adapter folder that may be uploaded, after a check of the adapter.

    Raises UserError for a folder that holds no whole adapter or no model card, and for a file that has a path or the
    name of this machine in it.
    """
    folder = Path(folder)
    if peft_format.places(folder)[1].exists():
        peft_format.read(folder)
    elif not (folder / gguf_format.ADAPTER).exists():
        files.read(folder)
    if not (folder / model_card.FILE).exists():
        raise UserError(f"{folder} has no model card: write {model_card.FILE}, or push the folder that save() wrote")
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if wrong := [f"{path.name} has {what} in it" for path in found for what in _private(path)]:
        raise UserError(f"{folder} is not pushed: {listed(wrong, 3)}; take it out first")
    return found


def push(
    folder: Path | str, repo: str, private: bool = False, dry_run: bool = False, api: Any = None
) -> tuple[list[Path], str | None]:
    """Upload an adapter folder with its model card to a repository of the hub, which is made if it is not there.

    Returns (the files, the address of the commit); with `dry_run` nothing is sent and there is no address. `api` is
    huggingface_hub's HfApi, by default a new one, which uses the token of this machine. Raises UserError as `files_of`
    does, for a name that no repository can have, and if the hub refuses.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    found = files_of(folder)
    try:
        validate_repo_id(checked(repo, str, "repo"))
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository, expected OWNER/NAME: {error}") from error
    if dry_run:
        return found, None
    if api is None:
        from huggingface_hub import HfApi  # slow to import

        api = HfApi()
    try:
        api.create_repo(repo_id=repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=[path.name for path in found],
            commit_message="Adapter made with loralab",
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors, that of a wrong name a ValueError
        raise UserError(f"the hub does not take {repo}: {next(iter(str(error).splitlines()), type(error))}") from error
    return found, str(getattr(commit, "commit_url", commit))


def _private(path: Path) -> Iterator[str]:
    """What of this machine a file names."""
    words = {"the path of its folder": str(path.parent.absolute()), "the folder of its user": str(Path.home())}
    if not (host := socket.gethostname()).isalpha():  # else it may be any word
        words["the name of this machine"] = host
    if path.suffix == ".safetensors":
        text = json.dumps(read_metadata(path))
    else:
        text = path.read_bytes().decode("utf-8", errors="replace")
    yield from (what for what, word in words.items() if len(word) > 1 and word in text)
    if path.suffix == ".json" and (place := next(_paths(read_json(path)), None)):
        yield f"the path {place}"


def _paths(data: Any, key: str = "") -> Iterator[str]:
    """The texts in a JSON value that are paths from the root of a machine, and no labels such as "/r/books"."""
    if isinstance(data, str):
        if len(data) > 1 and Path(data).is_absolute() and (key in BASE_KEYS or os.path.exists(data)):
            yield data
    elif isinstance(data, dict):
        for name, part in data.items():
            yield from _paths(part, name)
    elif isinstance(data, list):
        for part in data:
            yield from _paths(part)
