"""The watchdog on a rented machine, and the clock that it goes by."""

import os
import sys
from pathlib import Path

import pytest

from rollouts.cloud import watchdog

LIMIT_S = 600.0


class Clock:
    """Time that passes by sleeping. The time of day is set back by an hour when half of the limit has passed."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def monotonic(self) -> float:
        return 1e4 + self.passed_s

    def time(self) -> float:
        return 1.7e9 + self.passed_s - (3600.0 if self.passed_s > LIMIT_S / 2 else 0.0)

    def sleep(self, seconds: float) -> None:
        assert self.passed_s < 10 * LIMIT_S, "the machine bills on"
        self.passed_s += seconds


@pytest.mark.parametrize("idle_s", [0.0, 5 * LIMIT_S])
def test_a_time_of_day_that_is_set_back(
    idle_s: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: a machine whose clock is set back, as by its first NTP answer, is ended when its time has really passed.
    Red with the time of day, which it went by before."""
    clock, asked = Clock(), list[tuple[str, float]]()

    def ask(method: str, url: str, key: str) -> int:
        asked.append((method, clock.passed_s))
        return 200 if method == "GET" else watchdog.NOT_FOUND

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog, "ask", ask)
    monkeypatch.setattr(watchdog, "_in_use", lambda home: True)
    for name, instead in {"fork": int, "setsid": int, "dup2": max, "_exit": leave}.items():
        monkeypatch.setattr(os, name, instead)  # the process in the background is this one
    monkeypatch.setenv("RUNPOD_API_KEY", "scoped")
    monkeypatch.setattr(sys, "argv", ["", "runpod", "http://x", str(LIMIT_S), str(idle_s)])
    with pytest.raises(SystemExit):
        watchdog.main()
    assert [method for method, _ in asked] == ["GET", "DELETE"]
    assert asked[1][1] == pytest.approx(LIMIT_S, abs=watchdog.LOOK_S)
