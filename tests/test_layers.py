"""The layers of docs/architecture.md, held against every import in the tree, and against a Python without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("base_config", "deploy", "rollouts")

CLIENTS = tuple(  # of inference servers: they know nothing of the pool
    f"rollouts.training.inference.{name}"
    for name in (
        *(
            "adapted_engine",
            "client",
            "connections",
            "fan_out",
            "http",
            "inference_engine",
            "known_versions",
        ),
        *(
            "loop_lock",
            "requests",
            "sglang_client",
            "vllm_client",
            "weight_routes",
            "weights_on_disk",
        ),
    )
)

# module prefix -> which of our modules it may import; the longest prefix that fits decides
ALLOWED: dict[str, tuple[str, ...]] = {
    "base_config": ("rollouts.config",),
    "rollouts.config": (
        "rollouts.config",
        "rollouts.data_formats",
        "rollouts.python_source",
        "rollouts.run_dir",
    ),
    "rollouts.config.schema": ("rollouts.config.schema", "rollouts.data_formats"),
    "rollouts.config.checks": (
        "rollouts.config.checks",
        "rollouts.config.answer_limits",
        "rollouts.config.schema",
        "rollouts.config.field_types",
        "rollouts.data_formats",
        "rollouts.run_dir",
    ),
    "rollouts.config.field_types": (),
    "deploy": ("rollouts.cloud", "rollouts.remote", "rollouts.view"),
    "rollouts.cloud": (
        "rollouts.cloud",
        "rollouts.remote.errors",
        "rollouts.run_dir",
        "rollouts.view",
    ),
    "rollouts.cloud.machine_types": (),  # values: no network
    "rollouts.cloud.answer_fields": (),
    "rollouts.cloud.search_offers": ("rollouts.cloud.machine_types",),
    "rollouts.cloud.billing_alarm": ("rollouts.cloud.ledger",),  # nobody is asked
    "rollouts.cloud.ledger": ("rollouts.cloud.machine_types", "rollouts.run_dir"),
    "rollouts": ("rollouts.agents",),
    "rollouts.__main__": (),
    "rollouts.data_formats": ("rollouts.data_formats",),
    "rollouts.manifest": (),
    "rollouts.plain_files": (),
    "rollouts.python_source": (),
    "rollouts.machine": ("rollouts.machine",),
    "rollouts.run_dir": ("rollouts.run_dir", "rollouts.plain_files"),
    "rollouts.slurm": ("rollouts.run_dir", "rollouts.slurm"),
    "rollouts.slurm.job_states": (),
    "rollouts.agents": (
        "rollouts.agents",
        "rollouts.data_formats",
        "rollouts.training.calculator",
        "rollouts.training.datasets",
        "rollouts.training.inference",
        "rollouts.training.rewards.row_answer",
        "rollouts.training.types",
        "rollouts.training.user_code",
        "rollouts.training.weight_sync",
    ),
    "rollouts.engines": ("rollouts.engines",),
    "rollouts.engines.keys": (),
    "rollouts.engines.send_model": (),
    "rollouts.engines.receive_model": ("rollouts.engines.keys", "rollouts.engines.send_model"),
    "rollouts.engines.server_spec": ("rollouts.config",),
    "rollouts.engines.embedded.__main__": (
        "rollouts.engines",
        "rollouts.training.host_memory",
        "rollouts.training.open_files",
    ),
    "rollouts.engines.embedded.attention": ("rollouts.training.packed_attention",),
    "rollouts.engines.embedded.served_model": (
        "rollouts.engines",
        "rollouts.training.model_loading",
    ),
    "rollouts.engines.embedded.routes": ("rollouts.engines", "rollouts.training.weights.wire"),
    "rollouts.engines.sglang.cpu_launcher": (
        "rollouts.engines",
        "rollouts.training.stores",
        "rollouts.training.weights.wire",
    ),
    "rollouts.engines.sglang.launcher": ("rollouts.engines", "rollouts.training.stores"),
    "rollouts.engines.embedded.finisher": (
        "rollouts.engines.embedded",
        "rollouts.training.forward",
        "rollouts.training.loops.packing",
    ),
    "rollouts.engines.command_lines": ("rollouts.config", "rollouts.engines"),
    "rollouts.health": ("rollouts.health",),  # pure, but for what follows growing files
    "rollouts.health.live_records": (
        "rollouts.health",
        "rollouts.plain_files",
        "rollouts.run_dir",
    ),
    "rollouts.view": (
        "rollouts.view",
        "rollouts.health",
        "rollouts.run_dir",
        "rollouts.plain_files",
    ),
    "rollouts.api": ("rollouts.config", "rollouts.remote", "rollouts.run_dir", "rollouts.view"),
    "rollouts.remote": (
        "rollouts.cloud",
        "rollouts.config",
        "rollouts.data_formats",
        "rollouts.health",
        "rollouts.machine",
        "rollouts.run_dir",
        "rollouts.plain_files",
        "rollouts.manifest",
        "rollouts.remote",
        "rollouts.view",
    ),
    "rollouts.remote.errors": ("rollouts.view.escape",),
    "rollouts.remote.host": (
        "rollouts.python_source",
        "rollouts.machine",
        "rollouts.remote.errors",
        "rollouts.remote.host",
        "rollouts.run_dir",
        "rollouts.plain_files",
        "rollouts.slurm",
    ),
    "rollouts.remote.inputs": (
        "rollouts.python_source",
        "rollouts.config",
        "rollouts.data_formats",
        "rollouts.plain_files",
        "rollouts.remote.errors",
        "rollouts.remote.inputs",
    ),
    "rollouts.remote.plan": (
        "rollouts.config",
        "rollouts.machine",
        "rollouts.engines.command_lines",
        "rollouts.run_dir",
        "rollouts.remote.errors",
        "rollouts.remote.host.facts",  # of a host only what was learned there: a plan reaches none
        "rollouts.remote.host.gpus",
        "rollouts.remote.host.host_health",
        "rollouts.remote.inputs",
        "rollouts.remote.plan",
        "rollouts.remote.repository",
    ),
    "rollouts.remote.run": (
        "rollouts.config",
        "rollouts.manifest",
        "rollouts.plain_files",
        "rollouts.run_dir",
        "rollouts.remote.errors",
        "rollouts.remote.git",
        "rollouts.remote.host",
        "rollouts.remote.local_faults",
        "rollouts.remote.package",
        "rollouts.remote.plan",
        "rollouts.remote.repository",
        "rollouts.remote.run",
        "rollouts.view",
    ),
    "rollouts.worker": (
        "rollouts.config",
        "rollouts.health",
        "rollouts.machine",
        "rollouts.run_dir",
        "rollouts.plain_files",
        "rollouts.manifest",
        "rollouts.engines.keys",
        "rollouts.engines.diagnosis",
        "rollouts.engines.send_model",
        "rollouts.slurm",
        "rollouts.worker",
    ),
    "rollouts.worker.trainer": (
        "rollouts.config",
        "rollouts.run_dir",
        "rollouts.training.open_files",
        "rollouts.training.user_code",
        "rollouts.worker.builders",
        "rollouts.worker.stages",
    ),
    "rollouts.worker.trainer_hub": (),
    "rollouts.worker.data_preview": (
        "rollouts.config",
        "rollouts.data_formats",
        "rollouts.training",
    ),
    "rollouts.worker.stages": (
        "rollouts.config",
        "rollouts.data_formats",
        "rollouts.run_dir",
        "rollouts.agents",
        "rollouts.training",
        "rollouts.worker.builders",
        "rollouts.worker.stages",
    ),
    "rollouts.worker.builders": (
        "rollouts.config",
        "rollouts.data_formats",
        "rollouts.run_dir",
        "rollouts.engines.keys",
        "rollouts.agents",
        "rollouts.training",
        "rollouts.worker.builders",
    ),
    "rollouts.training": ("rollouts.training", "rollouts.data_formats", "rollouts.manifest"),
    "rollouts.training.agent_integration": ("rollouts.training", "rollouts.agents"),
    "rollouts.training.calculator": (),
    "rollouts.training.user_code": (),
    "rollouts.training.types": (),
    "rollouts.training.seams": ("rollouts.training.types",),
    "rollouts.training.advantages": (),
    "rollouts.training.loss_terms": (),
    "rollouts.training.head_ways": (),
    "rollouts.training.log_probs": ("rollouts.training.head_ways",),
    "rollouts.training.packed_attention": (),
    "rollouts.training.host_to_device": (),
    "rollouts.training.compiled_layers": (),
    "rollouts.training.forward": (
        "rollouts.training.host_to_device",
        "rollouts.training.log_probs",
        "rollouts.training.loss_terms",
        "rollouts.training.packed_attention",
    ),
    "rollouts.training.token_selection": (
        "rollouts.training.log_probs",
        "rollouts.training.loss_terms",
    ),
    "rollouts.training.policy_loss": (
        "rollouts.training.log_probs",
        "rollouts.training.loss_terms",
        "rollouts.training.token_selection",
    ),
    "rollouts.training.policy_statistics": (
        "rollouts.training.loss_terms",
        "rollouts.training.token_selection",
    ),
    "rollouts.training.rl_losses": (
        "rollouts.training.loss_terms",
        "rollouts.training.policy_loss",
        "rollouts.training.policy_statistics",
        "rollouts.training.token_selection",
    ),
    "rollouts.training.known_gradients": (
        "rollouts.training.loss_terms",
        "rollouts.training.rl_losses",
    ),
    "rollouts.training.reference": ("rollouts.training.model_loading",),
    "rollouts.training.checkpoint": (
        "rollouts.manifest",
        "rollouts.training.distributed",
        "rollouts.training.host_files",
        "rollouts.training.lora",
        "rollouts.training.metrics",
        "rollouts.training.model_files",
        "rollouts.training.optimizer_state",
        "rollouts.training.retention",
        "rollouts.training.whole_directories",
    ),
    "rollouts.training.model_files": (
        "rollouts.training.datasets.turn_end",
        "rollouts.training.lora",
        "rollouts.training.optimizer_state",
        "rollouts.training.whole_directories",
    ),
    "rollouts.training.whole_tensors": ("rollouts.training.distributed", "rollouts.training.lora"),
    "rollouts.training.whole_directories": (),
    "rollouts.training.host_files": ("rollouts.manifest", "rollouts.training.distributed"),
    "rollouts.training.bound_torchrun": ("rollouts.training.stores",),
    "rollouts.training.network_check": (
        "rollouts.training.distributed",
        "rollouts.training.nvidia_driver",
    ),
    "rollouts.training.retention": (),
    "rollouts.training.random_state": (),
    "rollouts.training.devices": ("rollouts.training.nvidia_driver",),
    "rollouts.training.nvidia_driver": (),
    "rollouts.training.compilers": (),
    "rollouts.training.distributed": ("rollouts.training.devices",),
    "rollouts.training.optimizer_state": ("rollouts.training.sharded_reader",),
    "rollouts.training.sharded_reader": (),
    "rollouts.training.alarms": (),
    "rollouts.training.filters": ("rollouts.training.advantages", "rollouts.training.types"),
    "rollouts.training.flops": (),
    "rollouts.training.metrics": (),
    "rollouts.training.backends": (
        "rollouts.training.host_memory",
        "rollouts.training.host_to_device",
        "rollouts.training.known_gradients",
        "rollouts.training.backends",
        "rollouts.training.compiled_layers",
        "rollouts.training.devices",
        "rollouts.training.checkpoint",
        "rollouts.training.distributed",
        "rollouts.training.forward",
        "rollouts.training.known_gradients",
        "rollouts.training.log_probs",
        "rollouts.training.lora",
        "rollouts.training.model_files",
        "rollouts.training.optim",
        "rollouts.training.optimizer_state",
        "rollouts.training.policy_statistics",
        "rollouts.training.reference",
        "rollouts.training.rl_losses",
        "rollouts.training.token_selection",
        "rollouts.training.model_loading",
        "rollouts.training.random_state",
        "rollouts.training.value_head",
        "rollouts.training.whole_tensors",
    ),
    "rollouts.training.value_head": ("rollouts.training.distributed",),
    "rollouts.training.rollout_gen": (
        "rollouts.data_formats",
        "rollouts.training.rollout_gen",
        "rollouts.training.advantages",
        "rollouts.training.rewards",
        "rollouts.training.types",
        "rollouts.training.user_code",
        "rollouts.training.datasets",
        "rollouts.training.inference",
        "rollouts.training.weight_sync",
    ),
    "rollouts.training.inference": (
        *CLIENTS,
        "rollouts.training.open_files",
        "rollouts.engines.keys",
    ),
    "rollouts.training.inference.pool": (
        "rollouts.training.inference",
        "rollouts.training.open_files",
    ),
    "rollouts.training.weight_sync": (
        "rollouts.training.inference",
    ),  # a face: names, without torch
    "rollouts.training.weights": (
        "rollouts.engines.send_model",
        "rollouts.training.devices",
        "rollouts.training.distributed",
        "rollouts.training.inference",
        "rollouts.training.lora",
        "rollouts.training.stores",
        "rollouts.training.weights",
        "rollouts.training.whole_tensors",
    ),
    "rollouts.training.weights.channel": (
        "rollouts.training.weights.channel",
        "rollouts.training.weights.wire",
        "rollouts.training.inference",
        "rollouts.training.devices",
        "rollouts.training.stores",
    ),
    "rollouts.training.weights.wire": (),
    "rollouts.training.weights.proof": (),
    "rollouts.training.open_files": (),
    "rollouts.training.rewards": (
        "rollouts.data_formats",
        "rollouts.training.rewards",
        "rollouts.training.types",
        "rollouts.training.user_code",
    ),
    "rollouts.training.datasets": (
        "rollouts.data_formats",
        "rollouts.training.datasets",
        "rollouts.training.types",
    ),
}
STANDARD_LIBRARY_ONLY = (
    "base_config",
    "rollouts.config",
    "rollouts.data_formats",
    "rollouts.run_dir",
    "rollouts.health",
    "rollouts.machine",
    "rollouts.manifest",
    "rollouts.slurm",
    "rollouts.engines.server_spec",
    "rollouts.engines.diagnosis",
    "rollouts.engines.keys",
    "rollouts.engines.command_lines",
    "rollouts.engines.receive_model",
    "rollouts.engines.send_model",
    "rollouts.worker",  # under the host's own Python; the trainer alone runs in the environment
)
EXCEPT = tuple(
    f"rollouts.worker.{part}" for part in ("trainer", "trainer_hub", "stages", "builders")
)


THE_LIBRARY = ("rollouts.training", "rollouts.agents", "rollouts.engines.embedded")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources() -> list[Path]:
    return [ROOT / "base_config.py", ROOT / "deploy.py", *sorted((ROOT / "rollouts").rglob("*.py"))]


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Every module imported anywhere in `source`, at the top or inside a function; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + int(is_package)]
                base = ".".join([*parts, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def allowed_for(module: str) -> tuple[str, ...]:
    fitting = [prefix for prefix in ALLOWED if under(module, (prefix,))]
    # types of what is handed over
    seams = ("rollouts.training.seams",) if under(module, THE_LIBRARY) else ()
    return (*ALLOWED[max(fitting, key=len)], *seams)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    found = []
    for name in sorted(imports_of(source, module, is_package)):
        if under(name, OURS):
            light = under(module, ("rollouts.worker",)) and not under(module, EXCEPT)
            if not under(name, (*allowed_for(module), module)) or (light and under(name, EXCEPT)):
                found.append(f"{module} imports {name}: not allowed by tests/test_layers.py")
        elif under(module, STANDARD_LIBRARY_ONLY) and not under(module, EXCEPT):
            if name.split(".")[0] not in sys.stdlib_module_names:
                found.append(f"{module} imports {name}: it has the standard library alone")
        elif under(
            module, ("deploy", "rollouts.cloud", "rollouts.remote", "rollouts.view")
        ) and name.split(".")[0] in (
            "torch",
            "transformers",
            "datasets",
        ):
            found.append(f"{module} imports {name}: the control side has no torch")
    return found


@pytest.mark.parametrize("file", sources(), ids=module_name)
def test_imports_point_one_way(file: Path) -> None:
    """Goal: docs/architecture.md's layers hold. Red with `import rollouts.remote` put into a training module."""
    assert violations(file.read_text(), module_name(file), file.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rollouts.training.loops.rl_loop", "import rollouts.remote.plan"),
        ("rollouts.remote.plan", "from rollouts.training import types"),
        ("rollouts.remote.plan", "def f():\n    import torch"),
        ("rollouts.worker.supervise.supervisor", "from rollouts.remote import plan"),
        ("rollouts.worker.supervise.supervisor", "import httpx"),
        ("rollouts.worker.supervise.supervisor", "from rollouts.worker.stages import sft"),
        ("rollouts.worker.trainer", "from rollouts.training.loops import run_sft_training"),
        ("rollouts.worker.builders.model", "from rollouts.worker.stages import parts"),
        ("rollouts.training.rl_losses", "from rollouts.config import Config"),
        ("rollouts.config.load", "import rich"),
        ("rollouts.config.schema.rl", "from rollouts.config.checks import config_problems"),
        ("rollouts.run_dir", "from rollouts.config import Config"),
        (
            "rollouts.training.inference.sglang_client",
            "from rollouts.training.inference.pool.engine_pool import EnginePool",
        ),
        (
            "rollouts.training.weights.channel.process_group",
            "from rollouts.training.weights import publish",
        ),
        ("rollouts.view.fold", "from rollouts.remote.errors import Problem"),
        ("rollouts.view.fold", "import datasets"),
        ("rollouts.remote.host.ssh", "from rollouts.remote.run import registry"),
        ("rollouts.remote.host.facts", "from rollouts.remote.plan import Plan"),
        ("rollouts.remote.plan.problems", "from rollouts.remote.host.transport import Transport"),
        ("rollouts.remote.inputs.code_files", "from rollouts.remote.repository import Code"),
        ("rollouts.remote.run.execute", "from rollouts.cloud.renting import rent"),
        ("rollouts.cloud.renting", "from rollouts.remote.commands import deploy"),
        ("rollouts.cloud.search_offers", "from rollouts.cloud.provider_api import ProviderApi"),
    ],
)
def test_the_check_can_fail(module: str, source: str) -> None:
    """Goal: each kind of violation is seen. Red when imports inside functions were passed over."""
    assert violations(source, module)


def test_control_side_works_where_torch_is_missing() -> None:
    """Goal: a laptop without torch can deploy. Red when `import torch` stood in rollouts/__init__.py."""
    blocked = ("torch", "transformers", "datasets", "numpy", "httpx", "starlette")
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"  # importing it now raises ImportError
        "import deploy, base_config, rollouts, rollouts.run_dir, rollouts.engines.command_lines\n"
        "import rollouts.worker.supervise.supervisor\n"
        "import pkgutil, importlib, rollouts.remote, rollouts.view\n"
        "for room in (rollouts.remote, rollouts.view):\n"
        "    for item in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "        importlib.import_module(item.name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
