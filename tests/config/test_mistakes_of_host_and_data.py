"""Each way of breaking target, host, model and data has a reason of its own."""

from typing import Any

import pytest

from tests.config.parts import a_lora
from tests.example_config import (
    example_config,
    replace_at,
)

BROKEN: list[tuple[str, Any, str]] = [
    ("target.gpu_ranks", [], "target.gpu_ranks=[]: needs at least one device"),
    ("target.gpu_ranks", [0, 0], "target.gpu_ranks=[0, 0]: needs each device once"),
    ("target.gpu_ranks", [-1], "target.gpu_ranks=[-1]: needs device indices"),
    ("target.gpu_ranks", (0,), "target.gpu_ranks=(0,): needs a list"),
    ("target.gpu_ranks", [True], "target.gpu_ranks[0]=True: needs int, found bool"),
    ("target.device_type", "tpu", "target.device_type='tpu': needs one of 'cuda', 'cpu', 'mps'"),
    ("target.sharding", "ddp", "target.sharding='ddp': needs one of 'none', 'full_shard'"),
    (
        "target.sharding",
        "hybrid_shard",
        "target.shard_group_size=-1: needs a divisor of the 1 ranks",
    ),
    (
        "target.shard_group_size",
        1,
        "target.shard_group_size=1: needs -1: only sharding='hybrid_shard' has groups",
    ),
    ("target.cpu_offload", True, "target.cpu_offload=True: needs False where sharding='none'"),
    ("host.installer", "conda", "host.installer='conda': needs one of 'uv', 'pip'"),
    (
        "host.constraints_file",
        "/etc/pins.txt",
        "host.constraints_file='/etc/pins.txt': needs a path inside",
    ),
    (
        "host.constraints_file",
        "../pins.txt",
        "host.constraints_file='../pins.txt': needs a path inside",
    ),
    ("host.requirements", ["-r more.txt"], "such as 'levenshtein>=0.26'; '-r more.txt' is none"),
    ("host.requirements", ["./vendored"], "'./vendored' is none"),
    ("host.requirements", ["a >= "], "'a >= ' is none"),
    ("host.requirements", ["a==1 # pinned"], "'a==1 # pinned' is none"),
    ("host.requirements", "a", "host.requirements='a': needs a list"),
    (
        "host.constraints_file",
        "rollouts:../x",
        "host.constraints_file='rollouts:../x': needs a path inside",
    ),
    ("host.env", {"A B": "1"}, "host.env['A B']: not the name of an environment variable"),
    ("host.env", {"A": 1}, "host.env={'A': 1}: needs a dict of str to str"),
    (
        "host.secrets",
        ["HF_HUB_OFFLINE"],
        "'HF_HUB_OFFLINE' here or in host.env, which is shown and saved, not both",
    ),
    ("host.secrets", ["my token"], "'my token' is not one"),
    ("host.disk_free_gib_min", -1.0, "host.disk_free_gib_min=-1.0: needs >= 0"),
    ("host.threads_per_process", 0, "host.threads_per_process=0: needs >= 1"),
    ("model.name", " ", "model.name=' ': needs a hub id or a directory"),
    ("model.dtype", "float16", "model.dtype='float16': needs one of 'float32', 'bfloat16'"),
    ("model.init_seed", -1, "model.init_seed=-1: needs 0 to 2**32 - 1"),
    ("model.compile", 1, "model.compile=1: needs bool, found int"),
    (
        "model.activation_checkpointing",
        "yes",
        "model.activation_checkpointing='yes': needs bool, found str",
    ),
    ("model.lora", a_lora(rank=0), "model.lora.rank=0: needs >= 1"),
    ("model.lora", a_lora(alpha=0.0), "model.lora.alpha=0.0: needs > 0"),
    ("model.lora", a_lora(dropout=1.0), "model.lora.dropout=1.0: needs 0 <= dropout < 1"),
    ("model.lora", a_lora(init_seed=-1), "model.lora.init_seed=-1: needs 0 to 2**32 - 1"),
    (
        "model.lora",
        a_lora(target_modules=[]),
        "model.lora.target_modules=[]: needs names of linear layers",
    ),
    (
        "model.lora",
        a_lora(target_modules="q_proj"),
        "='q_proj': needs one of 'all-linear', list[str]",
    ),
    (
        "model.lora",
        a_lora(),
        "rl.embedding_lr=0.001: needs 0: with model.lora only adapters are trained",
    ),
    ("data.sft_mixture", [], "data.sft_mixture=[]: empty, and output.mode='sft+rl' trains on it"),
    ("data.rl_mixture", [], "data.rl_mixture=[]: empty, and output.mode='sft+rl' trains on it"),
    ("data.sft_mixture", ["gsm8k"], "data.sft_mixture[0]='gsm8k': needs a DatasetSpec"),
    ("data.sft_mixture.0.repeat", 0, "data.sft_mixture[0].repeat=0: needs >= 1"),
    (
        "data.rl_mixture.0.max_samples",
        0,
        "data.rl_mixture[0].max_samples=0: needs >= 1, or -1 for all rows",
    ),
    ("data.eval_mixture.0.format", "csv", "data.eval_mixture[0].format='csv': needs one of"),
    ("data.eval_mixture.0.split", "", "data.eval_mixture[0].split='': needs the name of a split"),
    ("data.eval_mixture.0.name", "", "data.eval_mixture[0].name='': needs a hub id"),
    (
        "data.sft_mixture.0.shuffle_seed",
        -1,
        "data.sft_mixture[0].shuffle_seed=-1: needs 0 to 2**32 - 1",
    ),
    ("data.sft_mixture.0.start", -1, "data.sft_mixture[0].start=-1: needs >= 0"),
    (
        "data.sft_mixture.0.stop",
        0,
        "data.sft_mixture[0].stop=0: needs > start=0, or -1 for the end",
    ),
    ("data.sft_mixture.0.step", 0, "data.sft_mixture[0].step=0: needs >= 1"),
    (
        "data.sft_mixture.0.streaming",
        True,
        "data.sft_mixture[0].max_samples=-1: needs a number, or stop: streaming",
    ),
    (
        "data.sft_mixture.0.format",
        "spelling_bee",
        "data.sft_mixture[0].max_samples=-1: needs a number, or stop: form",
    ),
    (
        "data.rl_mixture.0.format",
        "text",
        "data.rl_mixture[0].format='text': needs a format with prompts",
    ),
    (
        "data.sft_order",
        "curriculum",
        "data.sft_order='curriculum': needs one of 'shuffled', 'sequence'",
    ),
    ("data.max_length", 1, "data.max_length=1: needs >= 2 tokens"),
    ("data.shuffle_seed", 2**32, "data.shuffle_seed=4294967296: needs 0 to 2**32 - 1"),
]


@pytest.mark.parametrize(("path", "value", "reason"), BROKEN, ids=lambda item: str(item)[:40])
def test_each_way_of_breaking_it_has_its_own_reason(path: str, value: Any, reason: str) -> None:
    """Goal: one break, one readable reason with path, value and rule. Red: removing a check leaves its row without."""
    problems = replace_at(example_config(), path, value).problems()
    assert len([problem for problem in problems if reason in problem]) == 1, problems
