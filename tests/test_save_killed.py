"""A save over an adapter that is killed, or whose disk fails, at any file operation leaves the old adapter or the new.

Each point of each kind of save is tried in a forked process, as in faults.py, which counts the operations.
"""

import shutil

import pytest
from archs import build, shake
from faults import Faults, fork

import loralab

WAYS = {"loralab": "save", "peft": "export"}


def adapter(seed, rank, **more):
    adapters = loralab.attach(build("bert"), rank=rank, targets="attention-qv", head=True, seed=seed, **more)
    shake(adapters, "default", seed)
    return adapters


def held(folder):
    """(rank, tensors) of what a folder is read as."""
    adapters = loralab.load(build("bert"), folder)
    return adapters.spec().recipe.factors.rank, adapters.state()


def same(one, other):
    return one[0] == other[0] and one[1].keys() == other[1].keys() and all(one[1][k].equal(other[1][k]) for k in one[1])


@pytest.fixture(scope="module", params=WAYS)
def saves(request, tmp_path_factory):
    """(how to save, the old folder, what the old and the new one hold)."""
    root, way = tmp_path_factory.mktemp("saves"), WAYS[request.param]
    old, new = adapter(1, 2), adapter(2, 3)
    getattr(old, way)(root / "old")
    getattr(new, way)(root / "new")
    return lambda folder: getattr(new, way)(folder), root / "old", held(root / "old"), held(root / "new")


def attempt(save, folder, fault, at):
    """(exit code, operations) of a save with a fault at one operation."""
    notes = folder.with_name("notes")
    notes.unlink(missing_ok=True)

    def work():
        faults = Faults(folder, fault, at)
        faults.install()
        try:
            save(folder)
        except loralab.UserError:
            return 3
        finally:
            faults.quiet = True
            notes.write_text(str(len(faults.done)))
        return 0

    code = fork(work)
    return code, int(notes.read_text()) if notes.exists() else 0


@pytest.mark.parametrize("fault", ["kill", "ENOSPC"])
def test_any_point_leaves_the_old_adapter_or_the_new(saves, tmp_path, fault):
    save, old, was, will = saves
    shutil.copytree(old, tmp_path / "whole")
    _, count = attempt(save, tmp_path / "whole", "none", 0)
    assert same(held(tmp_path / "whole"), will)
    left = {path.name for path in (tmp_path / "whole").iterdir()}
    assert count > 8
    found = []
    for at in range(1, count + 1):
        folder = tmp_path / str(at)
        shutil.copytree(old, folder)
        code, _ = attempt(save, folder, fault, at)
        assert code != 0, (at, code)
        now = held(folder)
        found.append("old" if same(now, was) else "new" if same(now, will) else "neither")
        save(folder)  # whatever is left there, the next save is whole and clears up
        assert same(held(folder), will)
        assert {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")} == left
    assert "neither" not in found
    assert found == sorted(found, reverse=True), "first the old one, then the new"
    assert set(found) == {"old", "new"}


def test_a_first_save_that_is_cut_off_leaves_no_adapter_or_the_whole(saves, tmp_path):
    save, _, _, will = saves
    headers = [name + end for name in ("adapter.json", "adapter_config.json") for end in ("", ".new")]
    _, count = attempt(save, tmp_path / "whole", "none", 0)
    found = []
    for at in range(1, count + 1):
        assert attempt(save, tmp_path / str(at), "kill", at)[0] < 0
        if any((tmp_path / str(at) / name).exists() for name in headers):
            assert same(held(tmp_path / str(at)), will)
            found.append(at)
        else:
            with pytest.raises(loralab.UserError, match="is no adapter folder"):
                held(tmp_path / str(at))
    assert 0 < len(found) < count


def test_a_read_changes_nothing_in_a_folder_that_was_cut_off(saves, tmp_path):
    """It may be another process that is still writing."""
    save, old, _, _ = saves
    shutil.copytree(old, tmp_path / "whole")
    _, count = attempt(save, tmp_path / "whole", "none", 0)
    for at in range(1, count + 1):
        folder = tmp_path / str(at)
        shutil.copytree(old, folder)
        attempt(save, folder, "kill", at)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        held(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
