"""The config builder: fields, problems and memory as the command has them; what it writes runs as it stands."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from rollouts.config import load_config
from rollouts.config.explain import all_fields
from rollouts.remote.ui_builder import Builder
from rollouts.view.ui.run_source import PageError
from tests.docs_blocks import ROOT
from tests.view.ui.conftest import Ui, opened

BASE = "configs/00_cpu_sft_rl.py"
# both before the page gets to do anything else
SEARCH_AND_GO_ON = """(word) => {
    const search = document.getElementById("search"), field = document.querySelector("[aria-label='rl.num_samples']");
    search.value = word;
    search.dispatchEvent(new Event("input", { bubbles: true }));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
}"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two of the shipped configs, and a file that is none."""
    (tmp_path / "configs").mkdir()
    for name in ("00_cpu_sft_rl.py", "sft_qwen.py"):
        shutil.copy(ROOT / "configs" / name, tmp_path / "configs")
    (tmp_path / "other.py").write_text("import os\nos.environ['ROLLOUTS_OWNED'] = '1'\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(settings: list[str], **more: Any) -> dict[str, Any]:
    return Builder(None).checked(BASE, settings, **{"gpu_memory_gib": 80, "other": "", **more})


def test_every_field_is_there_with_its_meaning(here: Path) -> None:
    """Goal: each field of the config that it begins from is listed with value, type and explanation; those with a
    closed list offer it."""
    fields = {field["path"]: field for field in Builder(None).fields(BASE)["fields"]}
    config = load_config(BASE)

    def leaves(value: Any, path: str) -> Iterator[str]:
        parts = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        )
        for key, item in parts:
            yield from leaves(item, f"{path}.{key}".lstrip("."))
        if not parts or not isinstance(value, dict):
            yield path

    known = {field.name for field in all_fields()}
    for path in leaves(config.to_json(), ""):
        name = path.rpartition(".")[2]
        if name in known and name != "kind":
            assert path in fields, path
    assert all(field["meaning"] for field in fields.values())
    assert fields["target.sharding"]["choices"][0] == '"none"' and fields["model.compile"][
        "choices"
    ] == ["True", "False"]


def test_problems_are_those_of_the_command(here: Path) -> None:
    """Goal: what `problems()` says of a changed config is told, and so is a value of a wrong type, a field that there
    is not, and a comma that would begin a sweep."""
    found = checked(["rl.num_samples=1", "sft.batch_size=-3"])
    assert any("rl.num_samples=1" in text for text in found["problems"])
    assert any("batch_size" in text for text in found["problems"])
    assert ["rl.num_samples", "8", "1"] in found["differences"]
    wrong = checked(["rl.num_samples=x", "rl.nope=3"])["problems"]
    assert "needs int" in wrong[0] and "no field 'rl.nope'" in wrong[1]
    assert "brackets" in checked(["rl.num_samples=2,4"])["problems"][0]
    assert checked([])["problems"] == checked([])["differences"] == []


def test_memory_is_that_of_the_plan(here: Path) -> None:
    """Goal: the table follows the size of the GPUs and of the batch; on a CPU there is none."""
    builder = Builder(None)
    tables = [
        builder.checked("configs/sft_qwen.py", [], gpu_memory_gib=size, other="")["memory"]
        for size in (24.0, 80.0)
    ]
    assert "23.5" in tables[0][-1] and "78.4" in tables[1][-1] and checked([])["memory"] == []


def test_what_is_written_is_the_config(here: Path) -> None:
    """Goal: the file spells out every field and loads as the changed config; nothing is written over, outside of the
    directory, or with problems in it."""
    builder = Builder(None)
    assert builder.write(BASE, ["rl.num_samples=4"], "mine.py") == {"file": "mine.py"}
    written = load_config("mine.py")
    assert written.rl is not None and written.rl.num_samples == 4
    assert (
        "# prompts" in (here / "mine.py").read_text()
        or (here / "mine.py").read_text().count("#") > 50
    )
    for name in ("mine.py", "../x.py", "/tmp/x.py", "x.txt", "none/x.py", ""):
        with pytest.raises(PageError):
            builder.write(BASE, [], name)
    with pytest.raises(PageError, match="1 problem"):
        builder.write(BASE, ["rl.num_samples=1"], "bad.py")
    assert sorted(file.name for file in here.glob("*.py")) == ["mine.py", "other.py"]


def test_a_file_that_is_no_config_is_never_run(here: Path) -> None:
    """Goal: one begins from config files and runs that are listed, and from nothing else."""
    builder = Builder(None)
    assert builder.bases() == [BASE, "configs/sft_qwen.py"]
    for name in ("other.py", "/etc/passwd", "../x", ""):
        with pytest.raises(PageError, match="not a config file here"):
            builder.fields(name)
    with pytest.raises(PageError, match="write the config first"):
        builder.run("none.py", start=False)


def test_what_is_typed_outlives_the_search(
    here: Path, browser: Browser, serve: Callable[..., Ui]
) -> None:
    """Goal: one who goes on to a field before its search is over types on in it. Red with every row made anew by the
    search: what was typed from then on went nowhere."""
    with opened(browser, serve(cwd=here), "/build") as page:
        page.wait_for_selector(".notice.fine")
        page.evaluate(SEARCH_AND_GO_ON, "num_samples")
        expect(page.locator(".setting").filter(has_text="model.dtype")).to_have_count(0)
        page.keyboard.type("2")
        expect(page.locator("#differences td").last).to_have_text("82")
        page.fill("#search", "")
        expect(page.locator(".setting").filter(has_text="model.dtype")).to_have_count(1)
        expect(page.get_by_label("rl.num_samples", exact=True)).to_have_value("82")


def test_a_config_is_made_in_the_page(
    here: Path, browser: Browser, serve: Callable[..., Ui]
) -> None:
    """Goal: a field is found by what it means, a wrong value is told at once and cannot be written; the right one is
    written, and its plan is shown before anything starts."""
    ui = serve(cwd=here)
    with opened(browser, ui, "/build") as page:
        page.wait_for_selector(".notice.fine")
        page.keyboard.press("/")
        page.keyboard.type("num_samples")
        field = page.get_by_label("rl.num_samples", exact=True)
        field.fill("1")
        expect(page.locator("#problems")).to_contain_text("rl.num_samples=1: needs >= 2")
        expect(page.locator("#write-button")).to_be_disabled()
        field.fill("4")
        expect(page.locator("#problems")).to_contain_text("This config can run.")
        expect(page.locator("#differences")).to_contain_text("rl.num_samples")
        page.locator("#only").check()
        expect(page.locator(".setting")).to_have_count(1)
        page.fill("#file", "made.py")
        page.get_by_role("button", name="Write").click()
        page.get_by_role("button", name="Show the plan").click()
        expect(page.locator("#said")).to_be_visible()
        assert (here / "made.py").is_file() and page.locator("#said").inner_text()
    with ui.client() as client:
        headers = {"origin": ui.base}
        for body in (
            "[]",
            "{",
            json.dumps({"settings": "x"}),
            json.dumps({"gpu_memory_gib": -1}),
            "x" * (2 << 20),
        ):
            assert client.post("/api/build/check", content=body, headers=headers).status_code == 400
        assert client.post("/api/build/check", json={"base": BASE}).status_code == 403
