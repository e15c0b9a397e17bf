"""Which build of torch real pip and uv install from indexes on loopback, and what is said where one is gone."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments import torch_index
from rollouts.worker.environments.installer import BootstrapError
from rollouts.worker.environments.virtual_environment import ensure_environment
from tests.worker.environments import deadline
from tests.worker.indexes import served, write_page, write_torch
from tests.worker.stands import events

BUILDS = {
    "simple": ("9.0.0", "9.1.0"),
    "whl/cpu": ("9.0.0+cpu", "9.1.0+cpu"),
    "whl/cu126": ("9.0.0+cu126",),
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A plain index and PyTorch's own, as they are laid out: the plain one has newer builds than cu126's."""
    directory = tmp_path_factory.mktemp("index")
    for place, versions in BUILDS.items():
        for version in versions:
            write_torch(directory / place, version)
        write_page(directory / place / "torch")
    with served(directory) as (url, _):
        yield url


@pytest.fixture
def asks(
    spec: EnvironmentSpec,
    index: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> EnvironmentSpec:
    """A specification that wants torch, on a host whose installer knows the plain index alone."""
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"{index}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv(torch_index.BASE_VARIABLE, f"{index}/whl")
    return replace(spec, requirements=["torch"], constraints="")


def torch_in(run: RunDir) -> str:
    return next(
        line
        for line in run.environment("trainer").read_text().splitlines()
        if line.startswith("torch==")
    )


@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize(
    ("build", "pin", "found"),
    [("cpu", "", "9.1.0+cpu"), ("index", "", "9.1.0"), ("cu126", "torch==9.0.0\n", "9.0.0+cu126")],
)
def test_each_build(  # noqa: PLR0917
    asks: EnvironmentSpec, run: RunDir, installer: str, build: str, pin: str, found: str
) -> None:
    """Goal: the build that the plan names is installed, by either installer, and recorded. Red without the options of
    the build's own index: 9.1.0 in each case."""
    base = sys.executable if installer == "uv" else asks.base_python
    spec = replace(asks, installer=installer, base_python=base, torch_build=build, constraints=pin)  # type: ignore[arg-type]
    ensure_environment(spec, run, deadline())
    assert torch_in(run) == f"torch=={found}"
    assert events(run, "environment")[-1]["torch_build"] == build
    assert json.loads((Path(spec.path) / ".complete").read_text())["built"]["torch_build"] == build


@pytest.mark.parametrize(
    ("address", "why"), [("{}/nowhere", "it answers 404"), ("http://127.0.0.1:9", "refused")]
)
def test_an_index_that_cannot_be_reached(  # noqa: PLR0917
    asks: EnvironmentSpec,
    run: RunDir,
    index: str,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    why: str,
) -> None:
    """Goal: where PyTorch's index is out of reach, torch comes from the configured one, which is said and recorded,
    also by a later run. Red without the fallback: pip's own error there, or nothing said."""
    monkeypatch.setenv(torch_index.BASE_VARIABLE, address.format(index))
    spec = replace(asks, torch_build="cpu", torch_fallback=True)
    ensure_environment(spec, run, deadline())
    ensure_environment(spec, run, deadline())
    assert torch_in(run) == "torch==9.1.0"
    _, ready, reused = events(run, "environment")
    for event in (ready, reused):
        assert event["torch_build"] == "index"
        assert (
            "index of cpu builds cannot be reached" in event["torch_note"]
            and why in event["torch_note"]
        )


def test_a_build_that_the_version_lacks(asks: EnvironmentSpec, run: RunDir) -> None:
    """Goal: a newer torch of another build, which pip prefers, is an error and not a surprise on the GPU. Red without
    the look at what was installed: ready, with a build for another CUDA."""
    with pytest.raises(
        BootstrapError,
        match=r"torch is 9\.1\.0, and host\.torch_build asks for \+cu126.*Pin a version",
    ):
        ensure_environment(replace(asks, torch_build="cu126"), run, deadline())
    assert [row["action"] for row in events(run, "environment")] == ["building"]
    # Where the plan has a fallback, as for a CPU, which runs any build, it is said and taken
    ensure_environment(replace(asks, torch_build="cu126", torch_fallback=True), run, deadline())
    assert torch_in(run) == "torch==9.1.0"
    ready = events(run, "environment")[-1]
    assert (
        ready["torch_build"] == "index"
        and "has no such build of this version" in ready["torch_note"]
    )


def test_uv_asks_the_public_index_in_its_own_way(spec: EnvironmentSpec) -> None:
    """Goal: with the public index uv gets its option for it, which asks it for PyTorch's packages alone. Red with the
    index given as another one to both."""
    source = torch_index.torch_source(replace(spec, installer="uv", torch_build="cu130"), {})
    assert source.options == ("--torch-backend", "cu130")
    source = torch_index.torch_source(replace(spec, torch_build="cu130"), {})
    assert source.options == ("--extra-index-url", f"{torch_index.PUBLIC_BASE}/cu130")
