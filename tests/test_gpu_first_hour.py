"""scripts/gpu_first_hour where there is no GPU: it runs to the end of what a CPU allows."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_first_hour, gpu_first_hour_steps
from scripts.gpu_first_hour import LINES, Line

ROOT = Path(__file__).resolve().parent.parent


def test_to_the_end_of_what_a_cpu_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: each line in order, timed; what needs a card is listed; a line that fails is named with what it means, and
    the rest goes on, exit 1. Red with an exit at the first failure, and with a field that no config has in CONFIGS."""
    log = tmp_path / "log"
    assert gpu_first_hour.main(["--dry-run", "--log", str(log)]) == 0
    said = capsys.readouterr().out
    shown = [line for line in said.splitlines() if not line.startswith("  ")]
    assert len(shown) == len(LINES) + 1 and f"{len(LINES)} lines, 0 failed" in shown[-1]
    for line, text in zip(LINES, shown, strict=False):
        assert text.endswith(f"  {line.name}") and text.startswith(
            "ok " if line.dry else f"needs  {line.cards} card"
        )
    assert "> torch " in said and "glibc" in log.read_text().lower()

    def broken(_: object) -> None:
        raise gpu_first_hour_steps.StepError("found 1, needs 2")

    monkeypatch.setitem(gpu_first_hour_steps.STEPS, "torch", broken)
    monkeypatch.setitem(gpu_first_hour_steps.STEPS, "smoke", lambda _: 1 / 0)
    monkeypatch.setattr(
        gpu_first_hour,
        "LINES",
        [line for line in LINES if line.dry[:1] in (("torch",), ("smoke",), ("config",))],
    )
    assert gpu_first_hour.main(["--dry-run", "--log", str(log)]) == 1
    said = capsys.readouterr().out
    assert (
        "error: found 1, needs 2" in said
        and "means: no card seen" in said
        and "ZeroDivisionError" in said
    )
    assert "2 failed" in said and "rl_math, three steps" in said


def test_a_line_that_fails_or_hangs(tmp_path: Path) -> None:
    """Goal: its last lines are shown, and one that hangs is ended with all that it started. Red without
    `end_group`."""
    program = (
        "import subprocess, sys; print('so far', flush=True); subprocess.run(['sleep', '617.5'])"
    )
    line = Line(0, "hangs", "nothing", (sys.executable, "-c", program), limit_s=1.5)
    assert gpu_first_hour.run_line(line, tmp_path / "log") == (
        False,
        ["so far", "not over after 1.5 s"],
    )
    processes = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    assert "sleep 617.5" not in processes.splitlines()
    line = Line(0, "fails", "nothing", (sys.executable, "-c", "raise SystemExit('why')"))
    assert gpu_first_hour.run_line(line, tmp_path / "log") == (False, ["why"])


def test_what_the_lines_name_is_there() -> None:
    """Goal: a file, a test or a config that was renamed is found here and not on a card. Red with any of them gone."""
    for line in LINES:
        for part in (*line.command, *line.dry):
            if part.endswith(".py") or part.startswith("scripts/"):
                assert (ROOT / part).is_file(), part
        if line.command[:2] == gpu_first_hour.STEPS:
            assert line.command[2] in gpu_first_hour_steps.STEPS
    assert gpu_first_hour_steps.losses_apart([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert gpu_first_hour_steps.losses_apart([1.0], [1.0, 2.0]) == float("inf")
