"""SkyPilot as a provider: over a stand-in for its Python interface, which is held against the real one's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.cloud import CloudError, GPUClient, MachineNeeds
from rollouts.cloud.accounts import find_offers
from rollouts.cloud.ledger import Ledger
from rollouts.cloud.machine_types import Offer
from rollouts.cloud.our_machines import look
from rollouts.remote.package import clone_requirements
from tests.built_environments import interpreter_with
from tests.cloud.conftest import QUICK
from tests.cloud.renting import job, kill_all, leases
from tests.cloud.test_cloud_verbs import config_that_rents
from tests.remote.hosts import ROOT, Host, Laptop

PACKAGE = Path(__file__).parent / "fakes" / "sky_package"


@pytest.fixture
def sky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SkyPilot that knows two clouds, without a cluster."""
    state = tmp_path / "sky"
    state.mkdir()
    (state / "clusters.json").write_text("{}")
    ssh = {"host": "127.0.0.1", "port": 9, "user": "nobody", "key": "KEY"}
    (state / "ssh.json").write_text(json.dumps(ssh))
    monkeypatch.setenv("FAKE_SKY", str(state))
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    monkeypatch.syspath_prepend(str(PACKAGE))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / ".rollouts"))
    for name in ("RUNPOD", "VAST", "LAMBDA", "PRIME"):
        monkeypatch.delenv(f"{name}_API_KEY", raising=False)
    return state


def clusters(sky: Path) -> list[str]:
    return [*json.loads((sky / "clusters.json").read_text())]


def offers(**needs: Any) -> list[Offer]:
    found = anyio.run(find_offers, MachineNeeds(**needs), ["sky"])
    assert found.problems == {}
    return found.offers


def test_offers_of_enabled_clouds(sky: Path) -> None:
    """Goal: the catalog's rows of the enabled clouds with so many GPUs are offers, the cheapest first; a price that is
    not a number is none; what is behind SkyPilot's own proxy is not asked for."""
    fitting = [o for o in offers(gpu_types=("h100",)) if not o.left_out]
    assert [(o.region, o.price_per_hour, o.spot) for o in fitting] == [
        ("gcp/us-east4", 2.4, False),
        ("aws/us-east-1", 6.88, False),
    ]
    spot = [o for o in offers(gpu_types=("h100",), spot=True) if not o.left_out]
    assert [(o.region, o.price_per_hour) for o in spot if o.spot] == [("aws/us-east-1", 2.5)]
    assert [o.gpus for o in offers(gpus=8) if not o.left_out] == [8]


def test_the_life_of_a_cluster(sky: Path) -> None:
    """Goal: a cluster is made under the name that the ledger has, found with its price, and ended; the ledger and
    SkyPilot agree."""
    client = GPUClient("sky", patience=QUICK)
    (offer, *_) = client.search(client.gpu_type.contains("H100"))
    machine = client.create(offer, public_key="ssh-ed25519 AAAA")
    assert clusters(sky) == [machine.name] and machine.machine_id == machine.name
    found = client.get(machine)
    assert found is not None and (found.state, found.price_per_hour) == ("ready", 2.4)
    assert "KEY" not in repr(found), "a private key is shown nowhere"
    assert [row.name for row in anyio.run(look, Ledger()).rows] == [machine.name]
    client.terminate(machine)
    assert clusters(sky) == [] and client.get(machine) is None
    assert Ledger().open_leases() == []


@pytest.mark.parametrize(
    ("fault", "kind", "step"),
    [
        ("ResourcesUnavailableError", "no capacity", "refused"),
        ("ResourcesUnavailableError left", "no capacity", "ended"),
        ("RuntimeError left", None, "created"),
    ],
)
def test_a_launch_that_fails(fault: str, kind: str | None, step: str, sky: Path) -> None:
    """Goal: without capacity nothing is left, also where the launch left a part; after an error that says nothing the
    cluster is looked for by its name. Red with the part left to bill."""
    (sky / "fault").write_text(fault)
    client = GPUClient("sky", patience=QUICK)
    (offer, *_) = client.search(client.gpu_type.contains("H100"))
    if kind is None:
        client.terminate(client.create(offer, public_key="ssh-ed25519 AAAA"))
        step = "ended"
    else:
        with pytest.raises(CloudError) as caught:
            client.create(offer, public_key="ssh-ed25519 AAAA")
        assert caught.value.kind == kind
    assert clusters(sky) == [] and [lease.step for lease in Ledger().leases()] == [step]


def test_a_whole_run(
    sky: Path,
    laptop: Laptop,
    make_host: Callable[..., Host],
) -> None:
    """Goal: a run on a machine of SkyPilot's: its address, user and key are read from there, its host key is pinned by
    us, and the cluster is ended."""
    machine = make_host(known=False)
    ssh = {"host": "127.0.0.1", "port": machine.port, "user": os.environ.get("USER") or "root"}
    (sky / "ssh.json").write_text(json.dumps({**ssh, "key": laptop.key.read_text().strip()}))
    for name in ("FAKE_SKY", "PYTHONPATH"):
        laptop.environment[name] = os.environ[name]
    laptop.environment["ROLLOUTS_HOME"] = str(laptop.rollouts_home)
    config = job(laptop, providers=["sky"])
    try:
        done = laptop.deploy(config, "--yes", "--run-id", "rented")
    finally:
        kill_all(f"HOME={laptop.home}", "guard_process")
    assert done.returncode == 0, done.stdout + done.stderr
    assert clusters(sky) == [] and [lease.step for lease in leases(laptop)] == ["ended"]
    (place,) = (laptop.rollouts_home / "cloud" / "machines").iterdir()
    assert (place / "key").stat().st_mode & 0o077 == 0
    assert (machine.directory / "host_key.pub").read_text().split()[1] in (
        place / "known_hosts"
    ).read_text()


def test_without_skypilot(tmp_path: Path) -> None:
    """Goal: where SkyPilot is not installed, that is said with what installs it."""
    config = config_that_rents(tmp_path, providers=["sky"])
    absent = "import sys; sys.modules['sky'] = None; sys.argv[0] = 'deploy'; import deploy; deploy.main()"
    command = [sys.executable, "-c", absent, "offers", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "rollouts[sky]" in done.stderr, done.stderr


# What is called of SkyPilot, with the parameters that are passed.
CALLS = {
    "sky.list_accelerators": ["gpus_only", "quantity_filter", "clouds", "all_regions"],
    "sky.launch": ["task", "cluster_name"],
    "sky.status": ["cluster_names", "refresh", "_include_credentials"],
    "sky.down": ["cluster_name"],
    "sky.Resources.__init__": ["infra", "instance_type", "accelerators", "use_spot", "disk_size"],
    "sky.Task.__init__": ["name", "num_nodes"],
    "sky.client.sdk.enabled_clouds": [],
}
LACKING = """
import inspect, json, operator, sys
import sky, sky.client.sdk
lacking = {"INIT", "UP", "STOPPED"} - {status.name for status in sky.ClusterStatus}
for call, names in json.load(sys.stdin).items():
    found = inspect.signature(operator.attrgetter(call.partition(".")[2])(sky)).parameters
    lacking |= {f"{call}({name})" for name in names if name not in found}
print(*sorted(lacking), end="")
"""


@pytest.mark.timeout(900)  # the environment may have to be made first
def test_the_stand_in_is_like_the_package(tmp_path: Path) -> None:
    """Goal: what is called exists in the real SkyPilot, with the parameters that are passed to it: in an environment of
    its own, since its servers' packages are not for everyone. Red with a parameter that it does not have."""
    python = interpreter_with("sky", clone_requirements(ROOT, ["sky"]))
    done = subprocess.run(
        [python, "-c", LACKING],
        input=json.dumps(CALLS),
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
