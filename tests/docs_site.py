"""Build the site of docs/ and check it: `make docs`. Links lead somewhere, and no page asks another host for anything.

    python tests/docs_site.py [FOLDER]     checks a site that is there, by default build/site after building it

The site is build/site/docs; what pages lead to outside docs/ (CARRIED) lies beside it.
"""

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = Path(__file__).parents[1]
SITE = REPO / "build/site"
CARRIED = ("studies/results/*/report/index.html", "examples/*.py", "examples/with_peft/*.py")
LOADS = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}
PASSIVE = {"canonical", "alternate", "next", "prev", "edit", "me"}  # links of a head that load nothing


class Page(HTMLParser):
    """The links of a page, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {value for key, value in attrs if key in ("id", "name") and value}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        for of, key in LOADS:
            if tag == of and found.get(key) and not PASSIVE & set((found.get("rel") or "").split()):
                self.loads.append(found[key])


def problems(site: Path) -> list[str]:
    """What is wrong with the links of a site, and what it would fetch from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    wrong = [] if pages else [f"{site} has no page"]
    for path, page in pages.items():
        where = path.relative_to(site)
        wrong += [f"{where} fetches {url}" for url in page.loads if urlsplit(url).netloc]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                wrong.append(f"{where} links to {link}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"{where} links to {link}, and {target.name} has no such heading")
    return wrong


def carried() -> list[Path]:
    """The files outside docs/ that are part of the site."""
    return sorted(file for pattern in CARRIED for file in REPO.glob(pattern))


def build() -> None:
    """Write the site anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "zensical", "build", "--clean"], cwd=REPO, check=True)
    for file in carried():
        copy = SITE / file.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (SITE / "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><title>loralab</title><meta http-equiv="refresh" content="0; '
        'url=docs/index.html"><a href="docs/index.html">loralab</a>\n'
    )


def main() -> int:
    """Build if no folder is named, then check."""
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else SITE
    if len(sys.argv) == 1:
        build()
    wrong = problems(site)
    print("\n".join(wrong) or f"{site / 'index.html'}: every link leads somewhere, and nothing is fetched")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
