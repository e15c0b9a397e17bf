"""`deploy ui` with a run of 1,000,000 samples: first paint, filters, memory, indexing, and how late live numbers are.

    .venv/bin/python -m benchmarks.ui [--samples 1000000] [--response-tokens 60] [--directory DIR]

A run directory is generated (or found again in DIR). The server is a process of its own, the page is opened in headless
Chromium, times are the browser's; memory is the server's resident set, its largest over all that was done. Live lag:
from an append to metrics.jsonl until its point is in the chart.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollouts.run_dir import HOME_VARIABLE, RunDir, Status, append_jsonl, write_json_atomic

ROOT = Path(__file__).resolve().parent.parent
GROUP, GROUPS = 8, 32  # samples of a prompt, prompts of a step
FILTERS = {
    "reward at least 0.99": "reward_min=0.99",
    "steps 100 to 200, worst first": "step_min=100&step_max=200&order=reward",
    "longest first": "order=-length",
    "cut off": "finish=length",
    "without contrast": "contrast=no",
    "one prompt": "prompt=p17&order=step",
    "a word in the text": "text=answer+7+of",
}


def make_run(path: Path, samples: int, tokens: int) -> RunDir:
    """Write a run of `samples` samples, each with `tokens` token ids and log-probs."""
    run, draw = RunDir(path), random.Random(0)
    path.mkdir(parents=True)
    steps = samples // (GROUP * GROUPS)
    write_json_atomic(
        run.status,
        Status(
            run_id=path.name,
            experiment_name="benchmark",
            state="running",
            stage="rl",
            message="training",
            started_at=time.time(),
            updated_at=time.time(),
            exit_code=None,
        ),
    )
    begun = {"time": time.time(), "kind": "training_started", "stage": "rl", "step": 0}
    append_jsonl(run.events, begun | {"steps_total": steps + 100})
    append_jsonl(run.metrics, *(metrics_row(step, draw) for step in range(1, steps + 1)))
    text = "because the sum of the digits is what it is, and " * 6
    numbers = json.dumps(
        {
            "tokens": [draw.randrange(50_000) for _ in range(2 * tokens)],
            "loss_mask": [1.0] * 2 * tokens,
            "rollout_log_probs": [round(-draw.random(), 4) for _ in range(tokens)],
        }
    )[1:-1]
    with run.rollouts.open("w") as file:
        for number in range(samples):
            step, place = divmod(number, GROUP * GROUPS)
            head = {
                "step": step + 1,
                "time": 1.79e9 + step,
                "group": place // GROUP,
                "prompt": {"question": f"question {number % 1000}?"},
                "prompt_id": f"p{number // GROUP % 1000}",
                "response": f"answer {number % 10} of {number}: {text}",
                "response_length": tokens if number % 9 else tokens // 2,
                "reward": round(draw.random(), 3) if number // GROUP % 5 else 1.0,
                "advantage": round(draw.random() - 0.5, 4),
                "finish_reason": "length" if number % 9 == 0 else "stop",
                "step_samples": GROUP * GROUPS,
            }
            file.write(f"{json.dumps(head)[:-1]}, {numbers}}}\n")
    return run


def metrics_row(step: int, draw: random.Random) -> dict[str, Any]:
    names = ("reward_mean", "loss", "entropy", "kl_sampler", "grad_norm", "tokens_per_s", "step_s")
    return {
        "stage": "rl",
        "step": step,
        "time": time.time(),
        **{name: draw.random() for name in names},
    }


class Server:
    """The command, as a process, and the largest memory that was seen of it."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, str(ROOT / "deploy.py"), "ui", str(directory), "--json"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.link = json.loads(self._process.stdout.readline())["link"]

    def memory_mb(self) -> float:
        """Return its largest resident set so far."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

    def end(self) -> float:
        """End it as Ctrl-C does. Returns the seconds that it took."""
        began = time.perf_counter()
        self._process.send_signal(2)
        self._process.wait(30)
        return time.perf_counter() - began


@contextlib.contextmanager
def browser_page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    with sync_playwright() as play:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = play.chromium.launch(executable_path=program, args=options)
        yield browser.new_page(viewport={"width": 1440, "height": 900})
        browser.close()


def first_paint_s(page: Any, address: str, shows: str) -> float:
    """Return the seconds from the request until `shows`, what the page is for, is there and painted."""
    began = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_selector(shows)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    return time.perf_counter() - began


def live_lag_s(page: Any, run: RunDir, step: int, draw: random.Random) -> float:
    """Return the seconds from an append to metrics.jsonl until the page shows its step."""
    append_jsonl(run.metrics, metrics_row(step, draw))
    began = time.perf_counter()
    page.wait_for_function(
        "(step) => document.querySelector('#stats .value')?.textContent.replace(/,/g, '').startsWith(step)"
        " && Number(document.body.dataset.updated) > 0",
        arg=str(step),
    )
    return time.perf_counter() - began


def measure(run: RunDir, repeats: int) -> None:
    server, draw = Server(run.path), random.Random(1)
    name, base = run.run_id, server.link.partition("/?")[0]
    with browser_page() as page:
        page.goto(server.link)
        began = time.perf_counter()
        print(
            f"while it is indexed: first paint {first_paint_s(page, f'{base}/runs/{name}/samples', '.samples a'):.2f} s"
        )
        page.wait_for_function(
            "(all) => document.getElementById('count').textContent.includes(`of ${all} samples`)"
            " && !document.querySelector('#progress progress')",
            arg=f"{sum(1 for _ in run.rollouts.open('rb')):,}",
            timeout=900_000,
        )
        print(
            f"indexed after {time.perf_counter() - began:.1f} s; memory {server.memory_mb():.0f} MB"
        )
        for what, address, shows in (
            ("the samples", f"{base}/runs/{name}/samples", ".samples a"),
            ("the run", f"{base}/runs/{name}", "#stats .stat:nth-child(2)"),
        ):
            times = [first_paint_s(page, address, shows) for _ in range(repeats)]
            print(
                f"first paint of {what}: median {statistics.median(times):.2f} s, most {max(times):.2f} s"
            )
        page.goto(f"{base}/runs/{name}/samples")  # where one filters
        asked = (
            "(path) => fetch(path).then((answer) => answer.json()).then((value) => value.fitting)"
        )
        for what, words in FILTERS.items():
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                count = page.evaluate(asked, f"{base}/api/runs/{name}/samples?{words}")
                times.append(time.perf_counter() - began)
            print(
                f"filter {what}: median {statistics.median(times):.3f} s, most {max(times):.3f} s; {count:,} fit"
            )
        page.goto(f"{base}/runs/{name}")
        page.wait_for_selector("body[data-live]")
        page.wait_for_selector(".chart svg")
        last = json.loads(run.metrics.read_bytes().splitlines()[-1])["step"]
        lags = [live_lag_s(page, run, last + n, draw) for n in range(1, repeats + 1)]
        print(f"live lag: median {statistics.median(lags):.2f} s, most {max(lags):.2f} s")
        print(f"largest memory of the server: {server.memory_mb():.0f} MB")
        page.goto("about:blank")
    print(f"ended {server.end():.2f} s after Ctrl-C")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--response-tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ[HOME_VARIABLE] = f"{name}/home"
        path = (options.directory or Path(name)) / "million"
        run = (
            RunDir(path)
            if path.is_dir()
            else make_run(path, options.samples, options.response_tokens)
        )
        print(f"{options.samples:,} samples, {run.rollouts.stat().st_size / 1e9:.2f} GB")
        measure(run, options.repeats)


if __name__ == "__main__":
    main()
