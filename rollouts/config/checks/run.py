"""Checks of the target, the host, limits and output."""

import dataclasses
import os
import urllib.parse

from rollouts.config.checks.needs import (
    ENV_NAME_PATTERN,
    Checks,
    at_least_one,
    matches,
    must,
    names_file,
    one_or_off,
    rank_checks,
)
from rollouts.config.schema import (
    HostConfig,
    LimitsConfig,
    Mlflow,
    OutputConfig,
    TargetConfig,
    TensorBoard,
    Trackio,
)
from rollouts.run_dir import EXPERIMENT_NAME_PATTERN

# PEP 508, less what a plan cannot carry: options, paths, comments. A URL may follow "@".
_NAME, _SPECIFIER = (
    r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?",
    r"(?:===|==|!=|~=|<=|>=|<|>)\s*[\w.*+!-]+",
)
REQUIREMENT_PATTERN = (
    rf"{_NAME}\s*(?:\[\s*{_NAME}(?:\s*,\s*{_NAME})*\s*\])?\s*"
    rf"(?:@\s*[\w+.-]+://\S+|(?:{_SPECIFIER}(?:\s*,\s*{_SPECIFIER})*)?)\s*(?:;[^\n#]+)?"
)
BEST_PATTERN = r"(min|max) \S+"


def target_checks(target: TargetConfig) -> Checks:
    yield from rank_checks(target.gpu_ranks, "target.gpu_ranks")
    yield from at_least_one(target, "target", "hosts")
    fewest = target.hosts_min
    need = f"1 to target.hosts={target.hosts}"
    yield must(1 <= fewest <= target.hosts, "target.hosts_min", fewest, need)
    sharded, ranks = target.sharding != "none", target.world_size
    yield must(
        target.device_type != "mps" or not sharded,
        "target.sharding",
        target.sharding,
        "'none': mps has one device",
    )
    yield must(
        sharded or not target.cpu_offload,
        "target.cpu_offload",
        target.cpu_offload,
        "False where sharding='none'",
    )
    size, hybrid = target.shard_group_size, target.sharding == "hybrid_shard"
    size_ok = (size >= 1 and ranks % size == 0) if hybrid else size == -1
    need = (
        f"a divisor of the {ranks} ranks"
        if hybrid
        else "-1: only sharding='hybrid_shard' has groups"
    )
    yield must(size_ok, "target.shard_group_size", size, need)
    one_mps = target.device_type != "mps" or len(target.gpu_ranks) == 1
    yield must(
        one_mps, "target.gpu_ranks", target.gpu_ranks, "one entry: device_type='mps' has one device"
    )


def host_checks(host: HostConfig) -> Checks:
    file = host.constraints_file
    need = "a path inside the repository, 'rollouts:requirements/…', or None"
    yield must(names_file(file), "host.constraints_file", file, need)
    for line in host.requirements:
        need = f"packages as pip names them, such as 'levenshtein>=0.26'; {line!r} is none"
        yield must(matches(REQUIREMENT_PATTERN, line), "host.requirements", host.requirements, need)
    for name in host.env:
        yield (
            matches(ENV_NAME_PATTERN, name),
            f"host.env[{name!r}]: not the name of an environment variable",
        )
    for name in host.secrets:
        ok = matches(ENV_NAME_PATTERN, name)
        yield must(
            ok, "host.secrets", host.secrets, f"names of environment variables; {name!r} is not one"
        )
        ok = name not in host.env
        yield must(
            ok,
            "host.secrets",
            host.secrets,
            f"{name!r} here or in host.env, which is shown and saved, not both",
        )
    yield must(
        host.disk_free_gib_min >= 0, "host.disk_free_gib_min", host.disk_free_gib_min, ">= 0"
    )
    yield from at_least_one(host, "host", "threads_per_process")


def limits_checks(limits: LimitsConfig) -> Checks:
    for field in dataclasses.fields(limits):
        value = getattr(limits, field.name)
        if field.name != "restarts_max":
            yield must(value > 0, f"limits.{field.name}", value, "> 0 seconds")
    yield must(limits.restarts_max >= 0, "limits.restarts_max", limits.restarts_max, ">= 0")


def output_checks(output: OutputConfig) -> Checks:
    yield must(bool(output.save_dir.strip()), "output.save_dir", output.save_dir, "a directory")
    name_ok = matches(EXPERIMENT_NAME_PATTERN, output.experiment_name)
    yield must(
        name_ok,
        "output.experiment_name",
        output.experiment_name,
        "1 to 48 letters, digits, '-' or '_'",
    )
    project_ok = bool(output.wandb_project.strip()) or not output.use_wandb
    yield must(
        project_ok, "output.wandb_project", output.wandb_project, "a name, since use_wandb=True"
    )
    yield from _tracker_checks(output)
    source = output.source_checkpoint
    source_ok = source is None or bool(source.strip())
    yield must(source_ok, "output.source_checkpoint", source, "a directory on the host, or None")
    for path, command in (
        ("output.on_end", output.on_end),
        ("output.on_warning", output.on_warning),
    ):
        command_ok = command is None or bool(command.strip())
        yield must(command_ok, path, command, "a shell command, or None")
    yield from one_or_off(output, "output", checkpoints_keep="all of them")
    for stage, best in output.checkpoint_best.items():
        yield must(
            stage in ("sft", "rl"),
            "output.checkpoint_best",
            output.checkpoint_best,
            "keys 'sft' and 'rl'",
        )
        ok = matches(BEST_PATTERN, best)
        path = f"output.checkpoint_best[{stage!r}]"
        yield must(ok, path, best, "'min <metric>' or 'max <metric>', a metric of metrics.jsonl")
        kept = output.checkpoints_keep != -1
        yield must(
            kept, path, best, "checkpoints_keep >= 1: with -1 all are kept, the best among them"
        )


def _tracker_checks(output: OutputConfig) -> Checks:
    kinds = [tracker.kind for tracker in output.fed]
    for kind in sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        short = ", use_wandb=True among them" if output.use_wandb and kind == "wandb" else ""
        yield (
            False,
            f"output.trackers: {kinds.count(kind)} of kind {kind!r}{short}; needs one of a kind",
        )
    for at, tracker in enumerate(output.trackers):
        path = f"output.trackers[{at}]"
        yield must(bool(tracker.project.strip()), f"{path}.project", tracker.project, "a name")
        if isinstance(tracker, Trackio | TensorBoard):
            ok = tracker.directory is None or os.path.isabs(tracker.directory)
            need = "an absolute path on the host, or None"
            yield must(ok, f"{path}.directory", tracker.directory, need)
        if isinstance(tracker, Mlflow) and tracker.tracking_uri is not None:
            uri = urllib.parse.urlsplit(tracker.tracking_uri)
            ok = bool(uri.scheme) and uri.password is None
            need = "an address such as 'https://mlflow.example.org', without a password: config.json keeps it"
            yield must(ok, f"{path}.tracking_uri", _without_password(tracker.tracking_uri), need)


def _without_password(uri: str) -> str:
    head, at, tail = uri.rpartition("@")
    return f"{head.partition('://')[0]}://…@{tail}" if at else uri
