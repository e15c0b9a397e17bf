"""Interpreters of the engines' own environments: an override by variable, else built once per machine and kept."""

import os
from pathlib import Path

from rollouts.remote.plan import read_lock
from tests.built_environments import interpreter_with

REPOSITORY = Path(__file__).parents[2]
OVERRIDES = {"sglang": "ROLLOUTS_TEST_SGLANG_PYTHON", "vllm": "ROLLOUTS_TEST_VLLM_PYTHON"}
LOCKS = {"sglang": "requirements/sglang-cpu.txt"}


def interpreter(kind: str) -> str:
    """A Python that has this kind of engine.

    What ROLLOUTS_TEST_<KIND>_PYTHON names; else SGLang's lock, installed as a run would install it: a run finds it
    there too. Raises KeyError for vLLM without the variable: its build for a CPU takes steps that no lock can say
    (requirements/vllm-cpu.txt).
    """
    given = os.environ.get(OVERRIDES[kind])
    if given:
        return given
    requirements, no_deps = read_lock((REPOSITORY / LOCKS[kind]).read_text())
    return interpreter_with("engine", requirements, no_deps)
