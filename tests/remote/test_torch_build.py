"""Which build of torch, and which Python, each environment gets: decided from config and facts alone."""

import dataclasses
from typing import Any

import pytest

from rollouts.config import BroadcastSync, DiskSync
from rollouts.remote.plan import Plan
from tests.remote.test_plan import CUDA, FACTS, H200, LOCK, SGLANG, plan_for

DISK = DiskSync(on_tmpfs=False)
CUDA_LOCK = f"{LOCK}nvidia-nccl-cu13==2.29.7\n"
SHARED: dict[str, Any] = {
    **CUDA,
    **SGLANG,
    "engine__weight_sync": BroadcastSync(bucket_mib=256),
    "engine__gpu_ranks": [1],
    "model__dtype": "bfloat16",
}
TWO = (H200, dataclasses.replace(H200, index=1, uuid="GPU-b"))
BLACKWELL = (dataclasses.replace(H200, name="NVIDIA B200"),)


def builds(plan: Plan) -> list[tuple[str, bool]]:
    assert plan.launch is not None
    return [(spec.torch_build, spec.torch_fallback) for spec in plan.launch.environments]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("cpu", True)),
        ({"host__torch_build": "cpu"}, ("cpu", False)),
        ({"host__torch_build": "index"}, ("index", False)),
        ({**CUDA, "facts": {"driver": "580.65.06"}}, ("cu130", True)),
        ({**CUDA, "facts": {"driver": "590.1"}}, ("cu130", True)),
        ({**CUDA, "facts": {"driver": "570.86.15"}}, ("cu126", False)),
        ({**CUDA, "facts": {"driver": "525.60.13"}}, ("cu126", False)),
        ({**CUDA, "facts": {"driver": "470.223.02"}}, ("index", False)),
        ({**CUDA, "facts": {"driver": None}}, ("index", False)),
        ({**CUDA, "host__torch_build": "cu128", "facts": {"driver": "580.1"}}, ("cu128", False)),
    ],
)
def test_the_build_by_device_and_driver(
    changes: dict[str, Any], expected: tuple[str, bool]
) -> None:
    """Goal: the newest build that the driver runs, a CPU's without a GPU; an older driver never falls back to an index
    whose torch it cannot run; `--plan` says it. Red with cu130 for each driver."""
    plan = plan_for(**{"host__torch_build": "auto", **changes})
    assert builds(plan) == [expected]
    (step,) = (step for step in plan.steps if " environment " in step.what)
    assert (
        "as the package index gives it" if expected[0] == "index" else f"torch build {expected[0]}"
    ) in step.why
    assert ("where PyTorch's own cannot be reached" in step.why) is expected[1]


def test_the_build_names_the_environment() -> None:
    """Goal: another build, another environment; "index" keeps the name that it had. Red with the build left out of the
    key: a CPU's environment taken for a GPU's."""
    paths = set()
    for build in ("auto", "cpu", "cu126", "cu128", "cu130", "index"):
        launch = plan_for(host__torch_build=build).launch
        assert launch is not None
        paths.add(launch.environments[0].path)
    assert len(paths) == 6  # auto may fall back, "cpu" may not


def test_an_engines_lock_has_its_torch() -> None:
    """Goal: a CUDA lock pins torch's packages, so it is installed unchanged; a CPU's lock gets a CPU build. Red with
    the trainer's build for both: cu126 beside packages of CUDA 13."""
    facts = {"driver": "550.54.14"}
    assert builds(plan_for(**CUDA, **SGLANG, facts=facts, host__torch_build="auto")) == [
        ("cu126", False),
        ("index", False),
    ]
    assert builds(plan_for(**SGLANG, host__torch_build="auto")) == [("cpu", True), ("cpu", True)]


PROBLEMS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "another torch",
        {"code": {"engine_requirements": CUDA_LOCK, "constraints": "torch==2.15.0\n"}},
        [
            "different versions of torch",
            "trainer: 2.15.0; engine: 2.13.0",
            "requirements/trainer-cuda.txt",
        ],
    ),
    (
        "no pin",
        {"code": {"engine_requirements": CUDA_LOCK, "constraints": ""}},
        ["whatever is newest, host.constraints_file pins none"],
    ),
    (
        "another CUDA",
        {"host__torch_build": "auto", "facts": {"gpus": TWO, "driver": "550.1"}},
        ["different CUDAs", "trainer: cu126 (NVIDIA driver 550.1); engine: cu13"],
    ),
    (
        "a CPU build",
        {"host__torch_build": "cpu"},
        ["'cpu' is a build without CUDA", "host.torch_build='auto'"],
    ),
    (
        "an old torch",
        {
            "engine__weight_sync": DISK,
            "code": {"engine_requirements": CUDA_LOCK, "constraints": "torch==2.11.0\n"},
        },
        ["torch 2.11.0 is too old", "2.12 or newer"],
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"), [row[1:] for row in PROBLEMS], ids=[row[0] for row in PROBLEMS]
)
def test_each_problem(changes: dict[str, Any], expected: list[str]) -> None:
    """Goal: known before a byte is sent, with the fix. Red with the check left out: no problem."""
    own: dict[str, Any] = {
        **SHARED,
        "code": {"engine_requirements": CUDA_LOCK},
        "facts": {"gpus": TWO, "driver": "580"},
    }
    problems = [problem.text() for problem in plan_for(**{**own, **changes}).problems]
    assert any(all(part in text for part in expected) for text in problems), problems


def test_the_same_torch_is_not_a_problem() -> None:
    """Goal: 2.13 and 2.13.0 are one version, with any build; a way that shares nothing may have two. Red with the texts
    compared."""
    own: dict[str, Any] = {
        **SHARED,
        "facts": {"gpus": TWO, "driver": "580.1"},
        "host__torch_build": "auto",
    }
    for pin in ("torch==2.13\n", "numpy==2.0\nTorch == 2.13.0+cu130 # by hand\n"):
        assert (
            plan_for(
                **{**own, "code": {"engine_requirements": CUDA_LOCK, "constraints": pin}}
            ).problems
            == ()
        )
    apart = {
        **own,
        "engine__weight_sync": DISK,
        "code": {"engine_requirements": CUDA_LOCK, "constraints": ""},
    }
    assert plan_for(**apart).problems == ()


def test_a_card_that_is_too_new_for_the_build() -> None:
    """Goal: an older driver's build has no code for a Blackwell card, and says so. Red without a look at the card."""
    plan = plan_for(**CUDA, host__torch_build="auto", facts={"gpus": BLACKWELL, "driver": "570.1"})
    (problem,) = plan.problems
    assert "cu126 has no code for NVIDIA B200" in problem.text() and "580" in problem.text()
    assert (
        plan_for(
            **CUDA, host__torch_build="auto", facts={"gpus": BLACKWELL, "driver": "580.1"}
        ).problems
        == ()
    )


SEEN = (("/usr/bin/python3.12", "3.12.3"), ("/usr/bin/python3.11", "3.11.9"))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, [("/usr/bin/python3", "3.11.2")] * 2),
        ({"python_version": "3.13.5"}, [("/usr/bin/python3", "3.13.5"), ("", "3.11")]),
        ({"python_version": "3.13.5", "pythons": SEEN}, [("/usr/bin/python3", "3.13.5"), SEEN[0]]),
        ({"python_version": "3.10.12", "has_venv": False}, [("", "3.11")] * 2),
        ({"python_version": "3.10.12", "has_venv": False, "pythons": SEEN[1:]}, [SEEN[1]] * 2),
        ({"has_venv": False}, [("", "3.11")] * 2),
    ],
)
def test_the_python_of_each_environment(
    facts: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    """Goal: the host's own Python where it fits, another there for a lock without wheels for it, a new one where none
    fits, without a problem and said. Red with facts.python for each: SGLang's lock does not install on 3.13."""
    tools = {name: path for name, path in FACTS.tools.items() if name != "uv"}
    plan = plan_for(**SGLANG, facts={**facts, "tools": tools})
    assert plan.problems == () and plan.launch is not None
    assert [
        (spec.base_python, spec.python_version) for spec in plan.launch.environments
    ] == expected
    assert plan.launch.base_python == "/usr/bin/python3"
    words = [step.why for step in plan.steps if " environment " in step.what]
    assert ["installed there by uv" in text for text in words] == [
        path == "" for path, _ in expected
    ]
    assert any("the host has no uv" in note for note in plan.notes) is (
        "" in [path for path, _ in expected]
    )


def test_a_host_without_uv() -> None:
    """Goal: host.installer='uv' is not a problem on a host that lacks it; it is brought, and the plan says so. Red with
    a problem of it."""
    plan = plan_for(host__installer="uv", facts={"tools": {"tmux": "t", "rsync": "r"}})
    assert plan.problems == () and any("the host has no uv" in note for note in plan.notes)
