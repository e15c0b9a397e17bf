"""Take pictures of real runs, on a desk in light and a telephone in dark: scripts/screenshots RUN [RUN].

Each page of `deploy ui`, the report, and a terminal. RUN is a run's directory, such as the demo's. With
a second one the comparison is of both. PNGs of 256 colours go to docs/pictures.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.text import Text

from rollouts.run_dir import RunDir, read_jsonl
from rollouts.view.display import STYLES, live_lines
from rollouts.view.fold import View, fold

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
SCREENS = {
    "desk": ({"width": 1440, "height": 900}, "light"),
    "telephone": ({"width": 375, "height": 812}, "dark"),
}


ALL_DRAWN = (
    "() => [...document.querySelectorAll('.chart')].every((chart) =>"
    " chart.getBoundingClientRect().top > innerHeight || chart.querySelector('svg'))"
)
SHOWN_PART = 0.7  # of the last stage's steps that the terminal's picture has


def look(page: Page, address: str, ready: str, file: Path) -> None:
    """Open a page, wait for what it is for, and keep what is to be seen."""
    page.goto(address)
    page.wait_for_selector(ready)
    if "/samples" in address:
        page.wait_for_selector("progress[aria-label=indexed]", state="detached")
        page.locator(".samples a").first.click()
        page.wait_for_selector(".turn")
        page.get_by_role("button", name="log-prob").click()
    if address.startswith("file:"):  # the report begins with a table, and has folded parts
        page.locator(".chart").first.scroll_into_view_if_needed()
        page.wait_for_selector(".chart svg")
    else:
        page.wait_for_function(ALL_DRAWN)
    page.screenshot(path=file)
    keep(file)


def keep(file: Path) -> None:
    """Write a picture anew with 256 colours, a third of its bytes, and say how large it is."""
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        file, optimize=True
    )
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


def terminal(run: RunDir, page: Page, file: Path) -> None:
    """Draw the live view of a run as it was in the midst of its last stage, on a terminal of 100 columns."""
    times = {(row["stage"], row["step"]): row["time"] for row in read_jsonl(run.metrics)}
    rows = [
        (row.get("time") or times.get((row["stage"], row["step"]), 0.0), path.name, row)
        for path in (run.events, run.metrics, run.eval, run.gpu)
        for row in read_jsonl(path)
    ]
    rows.sort(key=lambda item: item[0])
    last = [at for at, (_, name, _) in enumerate(rows) if name == "metrics.jsonl"]
    stage = rows[last[-1]][2]["stage"]
    steps = [at for at in last if rows[at][2]["stage"] == stage]
    view = View()
    for _, name, row in rows[: steps[int(SHOWN_PART * len(steps))]]:
        view = fold(view, name, row)
    lines = live_lines(view, "", width=100, utf8=True, doing_s=0.0, host_now=0.0)
    lines.append("keys: p pause, Tab next pane, d detach, s stop")
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=100, file=nowhere)
        for line in lines:
            console.print(Text(line, style=STYLES.get(line[:1], "dim")))
    drawn = console.export_svg(title=f"deploy attach {run.run_id}")
    page.set_content(drawn.replace("Fira Code", "DejaVu Sans Mono"))
    page.locator("svg").screenshot(path=file)
    keep(file)


def main() -> None:
    runs = [Path(name).resolve() for name in sys.argv[1:]]
    if not runs:
        sys.exit(__doc__)
    PICTURES.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "deploy.py"), "ui", "--json", *map(str, runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    link = json.loads(process.stdout.readline())["link"]
    first = runs[0].name
    pages: dict[str, tuple[str, str]] = {
        "runs": ("/", ".runs tbody tr"),
        "run": (f"/runs/{first}", ".chart svg"),
        "samples": (f"/runs/{runs[-1].name}/samples?contrast=yes&step_max=100", ".samples a"),
        "compare": (
            f"/compare?{'&'.join(f'run={run.name}' for run in runs)}",
            ".chart svg" if runs[1:] else ".empty",
        ),
        "build": ("/build?base=configs/rl_math.py", "#memory pre"),
    }
    report = Path(tempfile.mkdtemp()) / "report.html"
    command = [sys.executable, str(ROOT / "deploy.py"), "report", *map(str, runs), "-o"]
    subprocess.run([*command, str(report)], check=True)
    program = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    try:
        with sync_playwright() as play:
            options = ["--no-sandbox", "--disable-dev-shm-usage"]
            browser = play.chromium.launch(executable_path=program, args=options)
            for screen, (viewport, scheme) in SCREENS.items():
                settings: dict[str, Any] = {"viewport": viewport, "color_scheme": scheme}
                page = browser.new_page(**settings)
                page.set_default_timeout(60_000)
                page.goto(link)
                base = link.partition("/?")[0]
                for name, (path, ready) in pages.items():
                    look(page, base + path, ready, PICTURES / f"{name}-{screen}.png")
                look(page, report.as_uri(), ".chart", PICTURES / f"report-{screen}.png")
                if screen == "desk":
                    terminal(RunDir(runs[0]), page, PICTURES / "terminal.png")
                page.close()
            browser.close()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


if __name__ == "__main__":
    main()
