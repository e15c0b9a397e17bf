"""No code without a use: vulture's finds beside the names that something outside of our Python files uses."""

from pathlib import Path

import pytest
from vulture import Vulture

ROOT = Path(__file__).resolve().parent.parent
# tests are not a use
CODE = "base_config.py", "deploy.py", "rollouts", "scripts", "benchmarks", "configs"

PYTHON = "Python calls it"
SERVER = "Python's HTTP server reads or calls it"
TYPER = "a verb of the command line: typer calls it"
TRANSFORMERS = "a method or argument of transformers' cache protocol"
SGLANG = "SGLang reads it"
PARAMIKO = "paramiko reads or calls it"
LIBRARY = "the library's public surface: users call it"
OPTION = "an option of policy_loss, read by its name"
PAGE = "a page's template reads it"
CONFIGS = "configs name it by its dotted path"
ALLOWED = {
    "_": "torch calls it: the shapes of a custom operator",
    "__dir__": PYTHON,
    "__getattr__": PYTHON,
    "_from_model_config": "transformers reads it",
    "AskAgain": CONFIGS,
    "KeyGuard": "vLLM's command line names it",
    "RewardModel": LIBRARY,
    "WandbLogger": LIBRARY,
    "admin_api_key": SGLANG,
    "assign_extend_cache_locs_cpu": SGLANG,
    "assign_req_to_token_pool_cpu": SGLANG,
    "authenticate": PARAMIKO,
    "build_tree_kernel_efficient_cpu": SGLANG,
    "check_any_success": LIBRARY,
    "check_min_reward": LIBRARY,
    "check_quality_and_diversity": LIBRARY,
    "check_tree": "called by the program that a sync sends to the host",
    "contains": LIBRARY,
    "copy_all_layer_kv_cache_cpu": SGLANG,
    "cp": TYPER,
    "enable_batch_invariant_mode": SGLANG,
    "end_mean": PAGE,
    "fill_accept_out_cache_loc_cpu": SGLANG,
    "fill_bonus_tokens_cpu": SGLANG,
    "gc": TYPER,
    "get_mask_sizes": TRANSFORMERS,
    "get_max_length": TRANSFORMERS,
    "get_seq_length": TRANSFORMERS,
    "handshake_timeout": PARAMIKO,
    "importance_cap": OPTION,
    "kl_kind": OPTION,
    "ls": TYPER,
    "rm": TYPER,
    "log_table": LIBRARY,
    "missing_host_key": PARAMIKO,
    "pgid": "a field of a record on disk, for people",
    "pin_memory": "an argument and a method of torch, replaced for SGLang",
    "prometheus_host": SGLANG,
    "prometheus_port": SGLANG,
    "query_length": TRANSFORMERS,
    "redirect_request": PYTHON,
    "run_config": TYPER,
    "save_directory": "an argument of transformers' tokenizers",
    "timed_out": LIBRARY,
    "use_duck_shape": "torch reads it",
    "value_clip": OPTION,
    "verify_tree_greedy_cpu": SGLANG,
    "write_prompts": LIBRARY,
    "address_family": SERVER,
    "client_address": SERVER,
    "close_connection": SERVER,
    "daemon_threads": SERVER,
    "do_GET": SERVER,
    "do_POST": SERVER,
    "do_PUT": SERVER,
    "handle_error": SERVER,
    "log_message": SERVER,
    "protocol_version": SERVER,
}


def unused(paths: list[Path]) -> dict[str, str]:
    """Each name under rollouts, deploy and base_config without a use in `paths`, and where it is."""
    vulture = Vulture()
    vulture.scavenge([str(path) for path in paths])
    ours = [ROOT / name for name in CODE[:3]]
    return {
        str(item.name): f"{item.filename}:{item.first_lineno}"
        for item in vulture.get_unused_code(min_confidence=60)
        if any(Path(item.filename).is_relative_to(path) for path in ours)
    }


def test_every_name_has_a_use_or_a_reason() -> None:
    """Goal: what is no longer called is deleted, and the list of exceptions does not outlive them. Red with a function
    that only its test called (`pull_checkpoints`), and with a name in the list that is used."""
    found = unused([ROOT / name for name in CODE])
    assert {name: where for name, where in found.items() if name not in ALLOWED} == {}
    assert sorted(set(ALLOWED) - set(found)) == []


@pytest.mark.parametrize("line", ["def forgotten() -> None: ...", "class Forgotten: ..."])
def test_the_check_can_fail(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: an unused function or class is seen. Red with a confidence of 100 asked for."""
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "module.py").write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert unused([tmp_path / "rollouts"])
