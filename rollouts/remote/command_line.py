"""What a command line means: its first word is a verb or a config file; options may come before it."""

import difflib
import os
import pathlib
from typing import Any

from typer.core import TyperGroup

HOST_VERB, CONFIG_VERB = "check-host", "run-config"  # what a line without a verb means
OPTIONS_WITH_VALUE = (
    *(
        "--remote",
        "--hosts",
        "--host",
        "--run-id",
        "--window",
        "--port",
        "--set",
        "--skip",
        "--at-once",
        "--slurm",
        "--sky",
    ),
    *(
        "--state",
        "--experiment",
        "--since",
        "--sort",
        "--older-than",
        "--tag",
        "--only",
        "--bwlimit",
    ),
)
COMPLETION_OPTIONS = ("--install-completion", "--show-completion")
SHELLS = ("bash", "zsh", "fish")
HOST_OPTIONS = (
    "--remote",
    "--json",
    "--accept-new-host-key",
    "--no-accept-new-host-key",
    "--help",
    "-h",
)
PULL_OPTIONS = ("--no-checkpoints", "--only", "--bwlimit")
CONFIG_OPTIONS = (
    *HOST_OPTIONS,
    *(
        "--hosts",
        "--run-id",
        "--plan",
        "--show",
        "--detach",
        "--busy-ok",
        "--set",
        "--skip",
        "--yes",
    ),
    *PULL_OPTIONS,
    *("--wait", "--queue", "--at-once", "--slurm", "--sky"),
)


class ConfigOrVerb(TyperGroup):
    """The first word is a verb or a config file; options may come before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell completes it: whatever is wrong is still being typed
            return super().parse_args(ctx, begun_line(args, self.commands))
        try:
            line = with_verb(args, self.commands)
            if line[0] in COMPLETION_OPTIONS:
                self._completion(ctx, *line)
        except ValueError as error:
            ctx.fail(str(error))
        return super().parse_args(ctx, line)

    def _completion(self, ctx: Any, option: str, *shells: str) -> None:
        """Show or install a shell's completion, and exit. Raises ValueError for a shell that there is none for."""
        shell = shells[0] if len(shells) == 1 else this_shell() if not shells else ""
        if shell not in SHELLS:
            found = f"not {' '.join(shells)!r}" if shells else "and the one that runs this is none"
            raise ValueError(
                f"{option} is for {', '.join(SHELLS)}, {found}. For example: deploy {option} bash."
            )
        from typer import _completion_shared

        from rollouts.remote.shell_scripts import BASH, ZSH

        _completion_shared._completion_scripts.update(bash=BASH, zsh=ZSH)
        (asked,) = (param for param in self.params if option in param.opts)
        try:
            asked.callback(ctx, asked, shell)  # type: ignore[misc]  # one of typer's own, which has it
        except OSError as error:
            raise ValueError(
                f"{error.filename}: {error.strerror}. So nothing is installed."
            ) from None
        except UnicodeDecodeError:
            raise ValueError(
                f"your shell's start-up file is not UTF-8. So nothing is installed: add what"
                f" deploy --show-completion {shell} prints to it."
            ) from None

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete the first word: verbs and configs, or the options of `deploy CONFIG`."""
        to_run = self.commands[CONFIG_VERB]
        more = to_run.shell_complete(ctx, incomplete)
        for param in to_run.params:
            if param.name == "config" and not incomplete.startswith("-"):
                more += param.shell_complete(ctx, incomplete)
        found = {item.value: item for item in [*super().shell_complete(ctx, incomplete), *more]}
        return [*found.values()]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name `deploy CONFIG` as one types it where an option of it is wrong."""
        name, command, rest = super().resolve_command(ctx, args)
        return "CONFIG" if name == CONFIG_VERB else name, command, rest


def this_shell() -> str:
    """Return the name of the shell that runs this; "" where none is seen."""
    import shellingham

    try:
        return str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        return ""


def begun_line(args: list[str], verbs: Any) -> list[str]:
    """Return a line that is still being typed with its verb first; [] where neither verb nor config is there yet."""
    position = _first_word(args)
    if position is not None and args[position] in verbs:
        return [args[position], *args[:position], *args[position + 1 :]]
    awaits_value = bool(args) and args[-1] in OPTIONS_WITH_VALUE
    return [CONFIG_VERB, *args] if position is not None or awaits_value else []


def with_verb(args: list[str], verbs: Any) -> list[str]:
    """Return `args` with the verb first: `x.py --plan` → `run-config x.py --plan`, `--remote h ls` → `ls --remote h`.

    Raises ValueError for a word that can be neither a verb nor a config, and for an option that neither of the two
    verbs without a name has.
    """
    if "--version" in (args[: args.index("--")] if "--" in args else args):
        return ["--version"]
    if args and args[0] in COMPLETION_OPTIONS:
        return args
    position = _first_word(args)
    if position is None:
        asks_host = any(arg == "--remote" or arg.startswith("--remote=") for arg in args)
        if not asks_host or "--help" in args or "-h" in args:
            return args or ["--help"]
        _check_options(args, HOST_OPTIONS, "deploy --remote HOST")
        return [HOST_VERB, *args]
    word, others = args[position], [*args[:position], *args[position + 1 :]]
    if word == "help":
        about = next((other for other in others if not other.startswith("-")), "")
        if about and about not in verbs and (problem := _no_such_verb(about, verbs)):
            raise ValueError(problem)
        return [about, "--help"] if about in verbs else ["--help"]
    return [word, *others] if word in verbs else _with_config(args, word, others, verbs)


def _with_config(args: list[str], word: str, others: list[str], verbs: Any) -> list[str]:
    """Return the line of `deploy CONFIG`, whose first word is not a verb. Raises ValueError."""
    _check_options(args, CONFIG_OPTIONS, "deploy CONFIG")
    if "--help" in args or "-h" in args:
        return ["--help"]
    if problem := _no_such_verb(word, verbs):
        raise ValueError(problem)
    if more := _words(others):
        raise ValueError(_stray_words(word, [others[at] for at in more]))
    return [CONFIG_VERB, *args]


def _stray_words(config: str, words: list[str]) -> str:
    """Return what is wrong with words after the config: it is followed by options alone."""
    if more := [word for word in words if word.endswith((".py", ".json"))]:
        return f"one config at a time: {config}, then {' and '.join(more)}."
    if words[0].startswith("=") or any("=" in word for word in words):
        return (
            f"{words[0]!r} stands alone. A setting is one word: --set rl.matrix_lr=1e-6,"
            " several are each with a --set."
        )
    near = difflib.get_close_matches(f"--{words[0]}", CONFIG_OPTIONS, n=1, cutoff=0.8)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"{words[0]!r} after {config} is not an option.{meant} Options: {', '.join(CONFIG_OPTIONS)}."


def _check_options(args: list[str], known: tuple[str, ...], whose: str) -> None:
    """Raise ValueError for the first option that is not among `known`."""
    for arg in args[: args.index("--")] if "--" in args else args:
        name = arg.partition("=")[0]
        if arg.startswith("-") and name not in known:
            near = difflib.get_close_matches(
                name, (*known, *OPTIONS_WITH_VALUE, "--follow"), n=1, cutoff=0.6
            )
            meant = f" Did you mean {near[0]}?" if near and near[0] != name else ""
            meant = " It belongs to `deploy CONFIG`." if name in CONFIG_OPTIONS else meant
            raise ValueError(f"`{whose}` has no option {name}.{meant} Options: {', '.join(known)}.")


def _no_such_verb(word: str, verbs: Any) -> str:
    """Return what is wrong with a first word that is not a verb; "" if it is, or may be, a config."""
    if os.path.exists(word) or os.sep in word or word.endswith((".py", ".json")):
        return ""
    shown = sorted(verb for verb in verbs if verb not in (HOST_VERB, CONFIG_VERB))
    near = [
        f"deploy {verb}" for verb in difflib.get_close_matches(word.lower(), shown, n=1, cutoff=0.5)
    ]
    configs = {path.stem: f"deploy {path}" for path in pathlib.Path().glob("configs/*.py")}
    configs |= {path.stem: f"deploy {path}" for path in pathlib.Path().glob("*.py")}
    near += [configs[stem] for stem in configs if word in (stem, stem.partition("_")[2])]
    near += (
        []
        if near
        else [configs[stem] for stem in difflib.get_close_matches(word, configs, n=1, cutoff=0.75)]
    )
    # as RUN is written elsewhere
    near = ["deploy attach last", "deploy status last"] if word == "last" else near
    meant = f" Did you mean {' or '.join(f'`{line}`' for line in near)}?" if near else ""
    return f"{word!r} is neither a verb nor a config file.{meant} Verbs: {', '.join(shown)}."


def _first_word(args: list[str]) -> int | None:
    return next(iter(_words(args)), None)


def _words(args: list[str]) -> list[int]:
    """Return the places of what is neither an option nor the value of one."""
    found, skip = list[int](), False
    for index, arg in enumerate(args):
        if skip:
            skip = False
        elif arg in OPTIONS_WITH_VALUE:
            skip = True
        elif arg == "--":
            return [*found, *range(index + 1, len(args))]
        elif not arg.startswith("-"):
            found.append(index)
    return found
