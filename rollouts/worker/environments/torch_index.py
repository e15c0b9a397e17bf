"""Where an environment's torch comes from: PyTorch's own index of builds, or as the installer is configured.

Each build has an index of its own, <base>/<build>, whose versions carry the build: 2.13.0+cpu. pip takes it for the
newer of two equal versions; uv asks that index for PyTorch's packages alone. Standard library only.
"""

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollouts.run_dir import EnvironmentSpec

PUBLIC_BASE = "https://download.pytorch.org/whl"
BASE_VARIABLE = (
    "ROLLOUTS_TORCH_INDEX"  # of the host or host.env: a mirror's address in place of the public one
)
ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class TorchSource:
    """Where torch is taken from, decided on the host."""

    build: str  # "index": as the installer is configured
    options: tuple[str, ...]  # of pip or uv
    note: str  # what was done instead of the plan; "" where it was followed


def torch_source(spec: EnvironmentSpec, environment: Mapping[str, str]) -> TorchSource:
    """Follow the plan, or its fallback where PyTorch's index does not answer."""
    if spec.torch_build == "index":
        return TorchSource("index", (), "")
    base = environment.get(BASE_VARIABLE, PUBLIC_BASE).rstrip("/")
    if spec.torch_fallback and (problem := _unreachable(f"{base}/{spec.torch_build}/torch/")):
        note = (
            f"PyTorch's index of {spec.torch_build} builds cannot be reached ({problem}): torch comes from the"
            f" configured package index, whatever its build. {BASE_VARIABLE} in host.env can name a mirror."
        )
        return TorchSource("index", (), note)
    return TorchSource(spec.torch_build, _options(spec, base), "")


def _options(spec: EnvironmentSpec, base: str) -> tuple[str, ...]:
    index = f"{base}/{spec.torch_build}"
    if spec.installer == "pip":
        return ("--extra-index-url", index)
    if base == PUBLIC_BASE:
        return ("--torch-backend", spec.torch_build)
    # as pip does: the best of all indexes
    return "--index", index, "--index-strategy", "unsafe-best-match"


def _unreachable(url: str) -> str:
    """Ask for one page. Returns why it does not come; "" where it does."""
    certificates = os.environ.get("PIP_CERT") or None
    context = ssl.create_default_context(cafile=certificates) if url.startswith("https") else None
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S, context=context):
            return ""
    except urllib.error.HTTPError as error:
        return f"it answers {error.code}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)


def build_problem(
    source: TorchSource, requirements: Sequence[str], versions: Mapping[str, str]
) -> str:
    """Return what is wrong with the torch that was installed; "" where it is of the build that was asked for."""
    version = versions.get("torch")
    if (
        source.build == "index"
        or version is None
        or any("torch @" in line for line in requirements)
    ):
        return ""
    if version.partition("+")[2] == source.build:
        return ""
    return (
        f"torch is {version}, and host.torch_build asks for +{source.build}: PyTorch's index has no such build of this"
        f" version. Pin a version that it has in host.constraints_file, or set host.torch_build='index'."
    )
