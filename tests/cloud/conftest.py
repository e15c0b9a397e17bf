"""The four stand-ins, their keys and a ledger of the test's own. At the end of every test their bill has stopped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rollouts.cloud import provider_api
from rollouts.cloud.renting import Patience
from tests.cloud.fakes.lambda_labs import FakeLambda
from tests.cloud.fakes.prime import FakePrime
from tests.cloud.fakes.runpod import FakeRunPod
from tests.cloud.fakes.server import MADE, FakeCloud
from tests.cloud.fakes.vast import FakeVast
from tests.cloud.renting import renter, variables
from tests.remote.conftest import laptop, make_host, project, shared

__all__ = ["laptop", "make_host", "project", "renter", "shared", "variables"]
CLOUDS = {"runpod": FakeRunPod, "vast": FakeVast, "lambda": FakeLambda, "prime": FakePrime}
QUICK = Patience(settle_s=1.0, end_s=60.0, poll_s=0.02, ask_again_s=0.2)


@pytest.fixture(autouse=True)
def bills_have_stopped() -> Iterator[None]:
    """A machine that still bills at the end of a test is that test's failure, whichever way its provider was made."""
    MADE.clear()
    yield
    assert [bill for cloud in MADE if (bill := cloud.bill())] == [], "a machine was left billing"


@pytest.fixture
def clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, FakeCloud]]:
    """All four, with their keys."""
    made: dict[str, FakeCloud] = {name: cloud() for name, cloud in CLOUDS.items()}
    home = tmp_path / "home"
    home.mkdir()
    for name in ("XDG_CONFIG_HOME", "PRIME_TEAM_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables(made, home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(provider_api, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("rollouts.cloud.lambda_labs.CALL_GAP_S", 0.0)
    monkeypatch.setattr("rollouts.cloud.lambda_labs.LAUNCH_GAP_S", 0.0)
    yield made
    for cloud in made.values():
        cloud.stop()
