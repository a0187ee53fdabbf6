"""What `push` sends to the hub: an adapter's own files, checked by a stand-in that takes what the hub's API takes."""

import inspect
import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from archs import build, rows, shake
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from test_cli import adapter, cli, refused  # noqa: F401 (fixtures)

import loralab
from loralab import UserError, hub
from loralab.files import HEADER, TENSORS

OWN = {"README.md", HEADER, TENSORS, "task.json"}
JUNK = ["wrong.csv", "predictions.safetensors", "run.json", "metrics.jsonl", "rows.jsonl", ".env", "sub/adapter.json"]


class Hub:
    """Repositories as folders. Its methods refuse what those of HfApi do not take, and choose files as they do."""

    def __init__(self, root: Path) -> None:
        self.root, self.private = root, {}

    def create_repo(self, **given):
        bound = inspect.signature(HfApi.create_repo).bind(self, **given).arguments
        assert bound["exist_ok"] is True
        self.private[bound["repo_id"]] = bound["private"]

    def upload_folder(self, **given):
        bound = inspect.signature(HfApi.upload_folder).bind(self, **given).arguments
        source, target = Path(bound["folder_path"]), self.root / bound["repo_id"]
        there = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=bound["allow_patterns"]):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        assert bound["commit_message"]
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{bound['repo_id']}/commit/1",
            commit_message="",
            commit_description="",
            oid="1",
        )


def sent(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def folder(adapter, tmp_path):  # noqa: F811
    """The adapter of a run, with what else may lie about."""
    place = shutil.copytree(adapter, tmp_path / "here" / "adapter")
    (place / "sub").mkdir()
    for name in JUNK:
        (place / name).write_text("{}")
    return place


def test_the_adapters_own_files_are_sent_and_no_others(folder, tmp_path):
    api = Hub(tmp_path / "hub")
    found, address = hub.push(folder, "me/reviews", private=True, api=api)
    assert sent(tmp_path / "hub" / "me" / "reviews") == OWN == {path.name for path in found}
    assert address == "https://huggingface.co/me/reviews/commit/1"
    assert api.private == {"me/reviews": True}
    pushed = tmp_path / "hub" / "me" / "reviews"
    assert all((pushed / name).read_bytes() == (folder / name).read_bytes() for name in OWN)


def test_the_command_says_what_it_sends_and_with_dry_run_sends_nothing(folder, cli, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(tmp_path / "hub"))
    code, out, _ = cli("push", folder, "--repo", "me/reviews", "--dry-run")
    assert (code, (tmp_path / "hub").exists()) == (0, False)
    assert "would be uploaded to me/reviews" in out
    assert {line.split()[0] for line in out.splitlines() if " bytes" in line} == OWN
    assert all(name.partition("/")[0] in out.partition("left here: ")[2] for name in JUNK)
    code, out, _ = cli("push", folder, "--repo", "me/reviews")
    assert (code, sent(tmp_path / "hub" / "me" / "reviews")) == (0, OWN)
    assert out.startswith("uploaded to me/reviews")
    assert out.endswith("https://huggingface.co/me/reviews/commit/1\n")


def test_a_hub_that_is_not_reached_is_one_line(folder, refused):  # noqa: F811
    assert "the hub does not take me/reviews: " in refused("push", folder, "--repo", "me/reviews")


def test_the_handle_pushes_what_save_writes(tmp_path):
    model = build("bert")
    adapters = loralab.attach(model, "dora", name="a", rank=3, head=True)
    shake(adapters, "a")
    assert adapters.push("me/a", dry_run=True) is None
    assert adapters.push("me/a", api=Hub(tmp_path)) == "https://huggingface.co/me/a/commit/1"
    assert sent(tmp_path / "me" / "a") == OWN - {"task.json"}
    again = build("bert")
    loralab.load(again, tmp_path / "me" / "a")
    with torch.no_grad():
        assert torch.equal(again(**rows()).logits, model(**rows()).logits)


@pytest.mark.parametrize("layout", ["peft", "gguf"])
def test_an_export_is_sent_with_a_card_of_ones_own(layout, tmp_path):
    if layout == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    adapters = loralab.attach(build("llama"), "lora", name="a", rank=3, targets=["q_proj"])
    adapters.export(tmp_path / "out", layout=layout, base_name="some/base")
    with pytest.raises(UserError, match=r"has no model card: write README\.md"):
        hub.push(tmp_path / "out", "me/a", dry_run=True)
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    names = {"peft": {"adapter_config.json", "adapter_model.safetensors"}, "gguf": {"adapter.gguf"}}[layout]
    hub.push(tmp_path / "out", "me/a", api=Hub(tmp_path / "hub"))
    assert sent(tmp_path / "hub" / "me" / "a") == {"README.md", *names}


def in_card(text):
    def write(folder):
        (folder / "README.md").write_text(f"# Mine\nmade at {text(folder)}, for all\n")

    return write


def in_header(folder):
    task = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(task | {"base": "/data/models/secret"}))


def damaged(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (in_card(lambda folder: folder.absolute()), "README.md has the path of its folder in it"),
        (in_card(lambda folder: Path.home() / "runs"), "README.md has the folder of its user in it"),
        (in_card(lambda folder: socket.gethostname()), "README.md has the name of this machine in it"),
        (in_header, "task.json has the path /data/models/secret in it"),
        (damaged, "tensors changed since the adapter was saved"),
        (lambda folder: (folder / "README.md").unlink(), "has no model card"),
        (lambda folder: (folder / HEADER).unlink(), "is no adapter folder"),
    ],
)
def test_what_names_this_machine_or_is_no_whole_adapter_is_not_sent(change, why, folder, tmp_path):
    if "machine" in why and socket.gethostname().isalpha():
        pytest.skip("the name of this machine is a word, as any text may have it")
    change(folder)
    with pytest.raises(UserError, match=why):
        hub.push(folder, "me/reviews", api=Hub(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()


def test_an_export_that_names_its_base_by_a_path_is_not_sent(tmp_path):
    adapters = loralab.attach(build("llama"), "lora", name="a", rank=3, targets=["q_proj"])
    adapters.export(tmp_path / "out", base_name="/data/models/secret")
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match=r"adapter_config\.json has the path /data/models/secret in it"):
        hub.push(tmp_path / "out", "me/a", dry_run=True)


def test_labels_that_look_like_paths_are_no_paths(tmp_path):
    model = build("bert")
    folder = loralab.attach(model, name="a", rank=2, head=True, labels=["/r/books", "/r/films", "/"]).save(
        tmp_path / "a"
    )
    assert {path.name for path in hub.files_of(folder)} == OWN - {"task.json"}
    place = str(Path(__file__).absolute())
    header = json.loads((folder / HEADER).read_text())
    assert list(hub._paths(header)) == []
    assert list(hub._paths({"labels": ["/r/books", place], "base": {"name": "/nowhere/base"}})) == [
        place,
        "/nowhere/base",
    ]


@pytest.mark.parametrize("repo", ["", "a/b/c", "me/re views", "me/..", "-x", 7, None])
def test_a_name_that_no_repository_can_have_is_refused_in_a_dry_run_too(folder, repo):
    with pytest.raises(UserError, match="is no name of a repository|repo=.*: expected a text"):
        hub.push(folder, repo, dry_run=True)
