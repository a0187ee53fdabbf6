"""`loralab push`: an adapter folder to the hub."""

from pathlib import Path

from loralab import hub
from loralab.cli.show import pairs
from loralab.schema import listed


def push(folder: Path, /, *, repo: str, private: bool = False, dry_run: bool = False) -> None:
    """Upload an adapter folder with its model card; never rows, predictions or anything that names this machine.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab or PEFT.
    repo: str
        The repository on the hub: NAME or OWNER/NAME. It is made if it is not there.
    private: bool
        Make a new repository private.
    dry_run: bool
        Show what would be uploaded, and send nothing.
    """
    found, address = hub.push(folder, repo, private, dry_run)
    pairs(
        f"{'would be uploaded' if dry_run else 'uploaded'} to {repo}",
        {path.name: f"{path.stat().st_size:,} bytes" for path in found},
    )
    if rest := sorted(path.name for path in folder.iterdir() if path not in found):
        print(f"left here: {listed(rest, 20)}")
    if address:
        print(address)
