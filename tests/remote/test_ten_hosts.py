"""The shipped configs, planned on ten kinds of hosts with GPUs.

hosts_seen/ has what the facts' script prints on each, with nvidia-smi's words as its documentation and public reports
have them.
"""

from pathlib import Path

import pytest

from base_config import load_config
from rollouts.remote.host.facts import HostFacts, parse_facts
from rollouts.remote.plan import Plan, make_plan
from rollouts.remote.plan.gpu_problems import host_advice
from rollouts.remote.repository import Code, read_code
from rollouts.remote.texts import facts_text
from tests.remote.test_gpu_configs import GPU_CONFIGS, ROOT

SEEN = Path(__file__).parent / "hosts_seen"
# For each host: the configs that are refused there, with the words of each problem; the others start.
TABLE: dict[str, dict[str, list[str]]] = {
    "rtx4090": {
        "nanochat_sft_rl": ["GPU 0 is too small for the rl stage"],
        "rl_math": ["has 1 GPU; this config needs 4"],
        "sft_openwebtext": ["GPU 0 is too small for the sft stage"],
        "sft_qwen": ["has 1 GPU; this config needs 2"],
    },
    "l40s": {},
    "a100-40": {},
    # an MPS server shares its cards
    "a100-80": {"rl_math": ["has 2 GPUs; this config needs 4, [2, 3] are not there"]},
    "h100": {
        "01_debug_sft_rl": ["GPU 0 takes one process at a time"],
        "nanochat_sft_rl": ["GPU 0 takes one process at a time"],
    },
    "h200": {
        "01_debug_sft_rl": ["no C++ compiler", "Python 3.11.9 has no headers"],
        "rl_math": [
            "has 1 GPU; this config needs 4",
            "no C++ compiler",
            "Python 3.11.9 has no headers",
        ],
        "sft_qwen": ["has 1 GPU; this config needs 2"],
    },
    "gb10": {
        "rl_math": ["has 1 GPU; this config needs 4"],
        "sft_qwen": ["has 1 GPU; this config needs 2"],
    },
    "mig": {
        "01_debug_sft_rl": ["GPU 0 is split by MIG"],
        "nanochat_sft_rl": ["GPU 0 is split by MIG"],
        "rl_math": [f"GPU {index} is split by MIG" for index in range(4)],
        "sft_openwebtext": ["GPU 0 is split by MIG"],
        "sft_qwen": ["GPU 0 is split by MIG", "GPU 1 is split by MIG"],
    },
    "container": {
        "01_debug_sft_rl": ["/dev/shm is too small for the weights"],
        "rl_math": ["/dev/shm is too small for the weights"],
    },
    "driver550": {
        name: ["driver 550.54.14 is too old for the engine's environment", "glibc 2.31 is too old"]
        for name in ("01_debug_sft_rl", "rl_math")
    },
}
# The memory that each config needs there, in GiB: of each stage, and of the engines' GPUs where they have their own
MEMORY = {
    "rtx4090": {
        "01_debug_sft_rl": "10.7 21.2",
        "nanochat_sft_rl": "21.3 30.5",
        "sft_openwebtext": "32.5",
    },
    "l40s": {"01_debug_sft_rl": "10.7 28.5", "rl_math": "18.1 39.8", "sft_qwen": "17.9"},
    "a100-40": {"01_debug_sft_rl": "10.7 26.7", "rl_math": "18.1 35.5"},
    "a100-80": {"01_debug_sft_rl": "10.7 40.7", "nanochat_sft_rl": "21.3 30.5"},
    "h100": {"01_debug_sft_rl": "10.7 40.6", "rl_math": "18.1 69.3"},
    # whole gradients are kept, to reduce once a step
    "h200": {"01_debug_sft_rl": "10.7 61.9", "sft_qwen": "21.0"},
    # of a card that reports no memory
    "gb10": {"01_debug_sft_rl": "10.7 21.4", "sft_openwebtext": "32.5"},
    "mig": {"01_debug_sft_rl": "10.7 21.4", "rl_math": "18.1 22.5"},  # of a slice that tells none
    "container": {"nanochat_sft_rl": "21.3 30.5", "sft_openwebtext": "32.5"},
    "driver550": {"01_debug_sft_rl": "10.7 40.7", "sft_qwen": "17.9"},
}
CODES: dict[str, Code] = {}


def seen(name: str) -> HostFacts:
    lines = [line.partition("=") for line in (SEEN / f"{name}.txt").read_text().splitlines()]
    return parse_facts([(key, value) for key, _, value in lines])


def plan(host: str, name: str) -> Plan:
    config = load_config(ROOT / "configs" / f"{name}.py")
    if name not in CODES:
        CODES[name] = read_code(ROOT, config)
    return make_plan(
        config,
        seen(host),
        CODES[name],
        target=host,
        run_id="r1",
        local_dir="/here",
        secrets_set=config.host.secrets,
    )


@pytest.mark.parametrize("host", TABLE)
@pytest.mark.parametrize("name", [*GPU_CONFIGS, "00_cpu_sft_rl"])
def test_what_each_host_is_told(host: str, name: str) -> None:
    """Goal: each plan has the problems of its host, each with a fix, and no other. Red without any rule of
    gpu_problems.py that the table names."""
    problems, expected = plan(host, name).problems, TABLE[host].get(name, [])
    assert len(problems) == len(expected), [problem.text() for problem in problems]
    for words in expected:
        (problem,) = (problem for problem in problems if words in problem.message)
        assert problem.found and problem.needed and problem.fix


@pytest.mark.parametrize("host", MEMORY)
def test_the_memory_of_each_host(host: str) -> None:
    """Goal: what a config needs follows the card, and nothing is tight on these hosts; a card or a slice that tells no
    memory is said. Red with the engine's share of another card, and without the rule for whole gradients."""
    for name, needed in MEMORY[host].items():
        found = plan(host, name)
        cells = [line.split()[-2] for line in found.memory[2:]]
        assert " ".join(cells) == needed
        unknown = [note for note in found.notes if note.startswith("memory of GPU")]
        assert len(unknown) == (len(cells) if host in ("gb10", "mig") else 0) and not any(
            "tight" in n for n in unknown
        )


def test_the_table_is_whole() -> None:
    """Goal: every recorded host has its row. Red with a file that no row names."""
    assert (
        sorted(TABLE) == sorted(MEMORY) == sorted(path.stem for path in SEEN.iterdir())
        and len(TABLE) == 10
    )


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("driver550", ["cuda-compat-13-0", "glibc 2.34 or newer", "driver 580 or newer"]),
        ("container", ["--shm-size=8g", "64 of 64 MiB free: Docker's default"]),
        ("mig", ["nvidia-smi -i 0 -mig 0"]),
        ("h100", ["-c DEFAULT"]),
        ("h200", ["apt-get install g++", "apt-get install python3.11-dev"]),
        *((name, []) for name in ("rtx4090", "l40s", "a100-40", "a100-80", "gb10")),
    ],
)
def test_what_a_host_is_told_without_a_config(host: str, words: list[str]) -> None:
    """Goal: `deploy --remote HOST` says what it lacks, with the fix; a host that lacks nothing hears nothing. Red with
    the advice left out, and with GB10's [N/A] taken for a fault."""
    advice = [*host_advice(seen(host), host)]
    text = "\n".join(problem.text() for problem in advice)
    assert all(word in text for word in words) and bool(advice) == bool(words), text


def test_a_look_at_a_host_shows_what_gpu_runs_need() -> None:
    """Goal: `deploy --remote HOST` prints the cards, the driver and what lies beside them. Red without these rows."""
    text = facts_text("mig", seen("mig"), [])
    for words in (
        "NVIDIA H100 PCIe, 79 of 80 GiB free, compute capability 9.0, MIG on",
        "580.105.08",
        "glibc 2.35, x86_64",
    ):
        assert words in text
    for words in (
        "/dev/shm: 65536 of 65536 MiB free",
        "c++, g++, gcc, cc",
        "Python.h beside /usr/bin/python3.11",
    ):
        assert words in text


def test_what_is_taken_for_granted_is_said() -> None:
    """Goal: unknown memory and a shared exclusive card are notes. Red with either silent."""
    assert any(
        "GPU 0 (NVIDIA GB10) reports no memory ([N/A])" in note
        for note in plan("gb10", "01_debug_sft_rl").notes
    )
    assert any(
        "an MPS server shares it" in note for note in plan("a100-80", "01_debug_sft_rl").notes
    )
