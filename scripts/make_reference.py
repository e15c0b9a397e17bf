"""Make pages of docs/reference out of the code: config.md, cli*.md and symptoms.md.

    python -m scripts.make_reference

A field's type and meaning are those of rollouts/config/schema; what is allowed is what the checks say of a value that
is not. tests/test_reference.py holds the pages equal to what this makes.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

import deploy
from rollouts.health.rules import RULES
from rollouts.remote.help_page import PAGE
from scripts.config_reference import MADE, config_page

ROOT = Path(__file__).resolve().parent.parent


EXAMPLES = {
    deploy.CONFIG_VERB: "deploy configs/00_cpu_sft_rl.py --remote gpu-7 --run-id mine --detach",
    deploy.HOST_VERB: "deploy --remote gpu-7",
    "doctor": "deploy doctor --remote gpu-7 configs/00_cpu_sft_rl.py",
    "ls": "deploy ls --state failed,died --since 2d",
    "tag": "deploy tag last paper-baseline",
    "rm": "deploy rm first second --keep-results",
    "gc": "deploy gc --remote gpu-7 --older-than 30d",
    "status": "deploy status last --json",
    "attach": "deploy attach last",
    "resume": "deploy resume first --remote user@host --set rl.matrix_lr=1e-6",
    "sweep": "deploy sweep last --follow",
    "ssh": "deploy ssh last -- tail -n 5 logs/trainer.log",
    "cp": "deploy cp last:checkpoints/sft/latest model",
    "logs": "deploy logs last --follow --window engine-0",
    "stop": "deploy stop last",
    "pull": "deploy pull last",
    "forget": "deploy forget last",
    "new": "deploy new my_job.py --mode sft --model Qwen/Qwen2.5-0.5B --data data/mine.jsonl --gpus 1",
    "explain": "deploy explain rl.baseline",
    "data": "deploy data configs/00_cpu_sft_rl.py --rows 1",
    "guard": "deploy guard",
    "machines": "deploy machines end --orphans",
    "offers": "deploy offers my_run.py --set provision.spot=True",
    "diff": "deploy diff configs/00_cpu_sft_rl.py configs/00_cpu_sft_rl_agent.py",
    "report": "deploy report first second -o both.html",
    "track": "deploy track first --to trackio",
    "plot": "deploy plot first second --metric reward_mean -o reward.svg",
    "ui": "deploy ui --remote gpu-7 --port 8100",
}
CLOUD_VERBS = ("offers", "machines", "guard")
COMMON = 3  # verbs that have an option: it is told once
HEAD = ("| option | does |", "|---|---|")
CONFIG_VERBS = ("new", "explain", "data", "diff", "doctor")
TITLES = {deploy.CONFIG_VERB: "deploy CONFIG", deploy.HOST_VERB: "deploy --remote HOST"}


def title_of(verb: str) -> str:
    """A verb as it is typed, with its arguments."""
    command = typer.main.get_command(deploy.app).commands[verb]  # type: ignore[attr-defined]
    arguments = [
        param.metavar or param.name.upper()
        for param in command.params
        if param.param_type_name == "argument"
    ]
    return TITLES.get(verb, " ".join(["deploy", verb, *arguments]))


def cli_page() -> str:
    """The page on the command: what `deploy --help` says, and the two verbs without a name."""
    group: Any = typer.main.get_command(deploy.app)
    parts = [
        "# The command\n\n" + MADE + "\n",
        "```sh\ndeploy --help\n```\n",
        f"```output\n{PAGE.replace(chr(8) + chr(10), '').strip()}\n```\n",
        "`deploy --version` prints version and commit. `deploy VERB --help` prints the options of one verb. All verbs: "
        "[of runs](cli-runs.md), [of configs and hosts](cli-more.md), [of rented machines](cli-clouds.md).\n",
        "`deploy --install-completion` teaches your shell (bash, zsh or fish) to complete verbs, options, configs, "
        "fields and names of runs. `deploy --show-completion` prints its script; `deploy --show-completion bash` is "
        "for another shell than the one that runs.\n",
    ]
    for verb in TITLES:
        parts += _verb_section(verb, group.commands[verb], common=[])
    return "\n".join(parts)


def runs_page() -> str:
    """The page on each verb about runs."""
    others = (*CONFIG_VERBS, *CLOUD_VERBS)
    return _verbs_page("Verbs of runs", [verb for verb in _verbs() if verb not in others])


def more_page() -> str:
    """The page on the verbs about a config, or a host before a run."""
    return _verbs_page("Verbs of configs and hosts", CONFIG_VERBS)


def clouds_page() -> str:
    """The page on the verbs about rented machines."""
    about = " What they do: [rented machines](../guide/rented-machines.md)."
    return _verbs_page("Verbs about rented machines", CLOUD_VERBS, about)


def _verbs() -> dict[str, Any]:
    group: Any = typer.main.get_command(deploy.app)
    return {verb: command for verb, command in group.commands.items() if verb not in TITLES}


def _verbs_page(title: str, verbs: Sequence[str], about: str = "") -> str:
    """A page on some verbs, with the options that several of them have told once."""
    commands = {verb: _verbs()[verb] for verb in verbs}
    options = [row for command in commands.values() for row in map(_option_row, command.params)]
    common = [
        row
        for row in dict.fromkeys(options)
        if options.count(row) >= COMMON and "`--help`" not in row
    ]
    parts = [
        f"# {title}\n\n{MADE}\n",
        "```sh\ndeploy help\n```\n",
        f"Verbs of [the command](cli.md).{about} Options of several of them:\n",
        "\n".join([*HEAD, *common]) + "\n",
    ]
    for verb, command in commands.items():
        parts += _verb_section(verb, command, common)
    return "\n".join(parts)


def _verb_section(verb: str, command: Any, common: list[str]) -> Iterator[str]:
    yield f"## {title_of(verb)}\n"
    yield " ".join((command.help or "").split()) + "\n"
    yield f"```sh\n{EXAMPLES[verb]}\n```\n"
    rows = [_option_row(option) for option in command.params if option.name != "help"]
    own = [row for row in rows if row not in common]
    if own:
        yield "\n".join([*HEAD, *own]) + "\n"
    if shared := [option.opts[0] for option in command.params if _option_row(option) in common]:
        named = (name if name.startswith("--") else name.upper() for name in shared)
        yield f"{', '.join(f'`{name}`' for name in named)}: above.\n"


def _option_row(option: Any) -> str:
    names = " ".join(f"`{name}`" for name in option.opts + option.secondary_opts)
    if option.param_type_name == "argument":
        return f"| `{option.metavar}` | {option.help} |"
    value = f" `{option.metavar}`" if option.metavar else ""
    return f"| {names}{value} | {option.help} |"


def symptoms_page() -> str:
    """The page on what may look wrong in a run: each rule with its bound, its meaning and what to do."""
    parts = [
        "# Symptoms\n\n" + MADE + "\n",
        "```sh\ndeploy report last\n```\n",
        "Rules over a run's records. They are applied on the host every few seconds: a finding is a `warning` event, "
        "and is told to `output.on_warning`. `deploy report` applies them too. "
        "A rule that finds something is a reason to look, not a "
        "verdict: a task that is solved has no entropy and no contrast either. A run that has just begun has none. "
        "The code: `rollouts/health/rules.py`; what a trainer says while it runs: "
        "[metrics](metrics.md#a-run-that-learns-nothing).\n",
    ]
    for rule in RULES:
        parts.append(
            f"## {rule.cause}\n\nWhen: {rule.when}.\n\n{rule.means}\n\nWhat to do: {rule.fix}\n"
        )
    return "\n".join(parts)


PAGES = {
    "docs/reference/config.md": config_page,
    "docs/reference/cli.md": cli_page,
    "docs/reference/cli-runs.md": runs_page,
    "docs/reference/cli-more.md": more_page,
    "docs/reference/cli-clouds.md": clouds_page,
    "docs/reference/symptoms.md": symptoms_page,
}


def main() -> None:
    for name, make in PAGES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")
        sys.stdout.write(f"wrote {name}\n")


if __name__ == "__main__":
    main()
