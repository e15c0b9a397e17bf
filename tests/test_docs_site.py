"""The site of docs/: every page is in it, it asks no other machine for anything, and a broken link fails its build."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(site: Path, *config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "scripts" / "docs"), str(site), *map(str, config)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_site_has_every_page_and_asks_nobody(tmp_path: Path) -> None:
    """Goal: each page of docs/ is built and can be searched; scripts, styles and pictures come with the site. Red with
    the theme's fonts, and with a page left out."""
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stderr
    sources = sorted((ROOT / "docs").rglob("*.md"))
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert len(sources) > 40 and len(found) == len(sources)
    assert any("symptoms/#gpu_idle" in entry["location"] for entry in index["docs"])
    pages = [page.read_text() for page in (tmp_path / "site").rglob("*.html")]
    loaded = [
        address
        for page in pages
        for address in re.findall(r'<(?:script|link|img)[^>]*?(?:src|href)="([^"]*)"', page)
    ]
    assert loaded and not [address for address in loaded if re.match(r"(https?:)?//", address)]


@pytest.mark.parametrize("link", ["missing.md", "other.md#no-such-heading"])
def test_a_broken_link_fails(tmp_path: Path, link: str) -> None:
    """Goal: a page or a heading that does not exist is an error that names page and link. Red with `--quiet`, which
    counts no warnings, and with anchors left unchecked."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Another page\n")
    (tmp_path / "docs" / "index.md").write_text(f"# Pages\n\n[a page]({link})\n")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0 and "index.md" in done.stderr and link in done.stderr
