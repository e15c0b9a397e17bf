"""The four stand-ins, their keys and a ledger of the test's own. At the end of every test their bill has stopped."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from rollouts.cloud import provider_api
from rollouts.cloud.renting import Patience
from tests.cloud.fakes.lambda_labs import FakeLambda
from tests.cloud.fakes.prime import FakePrime
from tests.cloud.fakes.runpod import FakeRunPod
from tests.cloud.fakes.server import KEY, FakeCloud
from tests.cloud.fakes.vast import FakeVast

CLOUDS = {"runpod": FakeRunPod, "vast": FakeVast, "lambda": FakeLambda, "prime": FakePrime}
QUICK = Patience(settle_s=1.0, end_s=60.0, poll_s=0.02, ask_again_s=0.2)


def variables(clouds: Mapping[str, FakeCloud], home: Path) -> dict[str, str]:
    """The environment in which the stand-ins are the providers."""
    urls = {f"ROLLOUTS_{name.upper()}_URL": cloud.url for name, cloud in clouds.items()}
    keys = {f"{name.upper()}_API_KEY": KEY for name in clouds}
    return {**urls, **keys, "HOME": str(home), "ROLLOUTS_HOME": str(home / ".rollouts")}


@pytest.fixture
def clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, FakeCloud]]:
    """All four. A machine that still bills at the end of a test is that test's failure."""
    made: dict[str, FakeCloud] = {name: cloud() for name, cloud in CLOUDS.items()}
    home = tmp_path / "home"
    home.mkdir()
    for name in ("XDG_CONFIG_HOME", "PRIME_TEAM_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables(made, home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(provider_api, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("rollouts.cloud.lambda_labs.CALL_GAP_S", 0.0)
    yield made
    bills = {name: cloud.bill() for name, cloud in made.items()}
    for cloud in made.values():
        cloud.stop()
    assert bills == {name: {} for name in made}, "a machine was left billing"
