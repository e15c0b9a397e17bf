"""The options file of a Slurm job: the head of a batch script, as users have it, and what is wrong with it. Pure.

    #SBATCH --partition=gpu --time=12:00:00
    module load cuda/12.6

A line of `#SBATCH` has options, any other is shell that runs on the first node before the run.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from rollouts.config import Config
from rollouts.remote.errors import Problem

SHORT = {
    **{"A": "account", "b": "begin", "C": "constraint", "c": "cpus-per-task", "D": "chdir"},
    **{"d": "dependency", "e": "error", "G": "gpus", "J": "job-name", "L": "licenses"},
    **{"M": "clusters", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition"},
    **{"q": "qos", "a": "array", "i": "input", "t": "time", "W": "wait", "w": "nodelist"},
    **{"x": "exclude", "F": "nodefile", "H": "hold", "s": "oversubscribe"},
}
ALONE = ("exclusive", "hold", "oversubscribe", "requeue", "no-requeue", "wait", "overcommit")
# What the run decides itself, and why
OURS = {
    "job-name": "it is the run's name: use --run-id",
    "output": "it is logs/slurm.log of the run, which is pulled",
    "error": "it is logs/slurm.log of the run, which is pulled",
    "input": "the run reads none",
    "chdir": "it is the run's code",
    "array": "one run is one job",
    "wrap": "the script is the run's",
    "wait": "`deploy` follows the run",
    "ntasks": "one supervisor a node starts all processes",
    "ntasks-per-node": "one supervisor a node starts all processes",
    "clusters": "the cluster is the login host's",
    "export": "the run has the environment of the login host and of the lines below",
}
GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gres")
SIGNAL = re.compile(r"B:(?:SIG)?USR1@\d+", re.IGNORECASE)
STARTS = re.compile(r"(?:exec\s+)?(srun|sbatch|salloc|exit|torchrun)\b")


@dataclass(frozen=True)
class SlurmOptions:
    """What the options file says."""

    file: str
    options: tuple[tuple[str, str | None], ...]  # (long name, value)
    shell: tuple[str, ...]

    def value(self, name: str) -> str | None:
        """Return the last value of an option; None where it is not there."""
        return next((value for own, value in reversed(self.options) if own == name), None)

    def has(self, *names: str) -> bool:
        return any(own in names for own, _ in self.options)


def read_options(text: str, file: str) -> tuple[SlurmOptions, list[Problem]]:
    """Read an options file; return it with what cannot be read of it."""
    options: list[tuple[str, str | None]] = []
    shell: list[str] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if bare.startswith("#SBATCH"):
            try:
                options += _options(shlex.split(bare.removeprefix("#SBATCH"), comments=True))
            except ValueError as error:
                problems.append(_unreadable(f"{file}:{number}: {bare!r}: {error}."))
        elif bare and not bare.startswith("#"):
            shell.append(line)
            if found := STARTS.match(bare):
                problems.append(
                    Problem(
                        f"{file}:{number}: {bare!r} would start something else than the run.",
                        needed="lines that make a node ready, such as `module load cuda`",
                        fix=f"remove it: `{found[1]}` is not needed, the run's own comes after these lines",
                    )
                )
    return SlurmOptions(file, tuple(options), tuple(shell)), problems


def _options(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (long name, value). Raises ValueError for what is no option."""
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = name[2:]
        elif re.fullmatch(r"-[A-Za-z].*", word):
            if word[1] not in SHORT:
                raise ValueError(f"{word[:2]} is not known here; write the long option")
            name, value = SHORT[word[1]], word[2:].removeprefix("=")
            equals = value
        else:
            raise ValueError(f"{word!r} is not an option")
        if not equals and name not in ALONE and waiting and not waiting[0].startswith("-"):
            value, equals = waiting.pop(0), "="
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ValueError(f"{word!r} is not an option")
        yield name, value if equals else None


def _unreadable(message: str) -> Problem:
    return Problem(message, needed="#SBATCH --partition=gpu, as sbatch reads it")


def option_problems(options: SlurmOptions, config: Config) -> Iterator[Problem]:
    """List what of the options the run decides itself, and what contradicts the config."""
    for name in dict.fromkeys(own for own, _ in options.options):
        if name in OURS:
            yield Problem(
                f"{options.file}: --{name} cannot be set.", needed=OURS[name], fix="remove it"
            )
    nodes, wanted = options.value("nodes"), config.job_hosts
    if nodes not in (None, str(wanted), f"{wanted}-{wanted}"):
        yield Problem(
            f"{options.file}: --nodes={nodes}, and the config asks for {wanted}.",
            found=f"target.hosts={config.target.hosts}",
            fix="remove it: the run asks for as many as it uses; or set target.hosts",
        )
    if options.has("requeue") and options.has("no-requeue"):
        yield Problem(
            f"{options.file}: --requeue and --no-requeue: one of the two.",
            needed="--requeue: the run goes on in the same job; without it `deploy resume` goes on",
        )
    signal = options.value("signal")
    if signal is not None and not SIGNAL.fullmatch(signal):
        yield Problem(
            f"{options.file}: --signal={signal} would not save a checkpoint.",
            needed="--signal=B:USR1@SECONDS: so long before the end the run is asked for one",
        )
    yield from _gpu_problems(options, config)
    if "CUDA_VISIBLE_DEVICES" in config.host.env:
        yield Problem(
            "host.env sets CUDA_VISIBLE_DEVICES, and Slurm says which GPUs the run has.",
            fix="take it out of host.env; gpu_ranks count the GPUs that Slurm gives",
        )


def _gpu_problems(options: SlurmOptions, config: Config) -> Iterator[Problem]:
    needed = gpus_needed(config)
    for name, value in options.options:
        if name not in GPU_OPTIONS or (name == "gres" and "gpu" not in (value or "")):
            continue
        asked = _gpu_count(value or "")
        wanted = needed * config.job_hosts if name == "gpus" else needed
        if asked != wanted:
            uses = "none" if not wanted else f"{wanted}"
            yield Problem(
                f"{options.file}: --{name}={value} asks for {asked} GPUs, and the config uses {uses}.",
                found="target.gpu_ranks and engine.gpu_ranks name "
                f"{needed} GPUs a node, on {config.job_hosts} nodes",
                fix="remove it: the run asks for as many as it uses; or change the config",
            )


def _gpu_count(value: str) -> int:
    """Return how many GPUs `gpu:a100:2`, `a100:2`, `gpu` or `2` ask for."""
    found = 0
    for part in value.split(","):
        words = part.removeprefix("gres/").partition("(")[0].split(":")
        if len(words) > 1 and "gpu" in value and words[0] != "gpu":
            continue  # gpu:1,shard:2
        found += int(words[-1]) if words[-1].isdigit() else 1
    return found


def gpus_needed(config: Config) -> int:
    """Return how many GPUs a node has to give: gpu_ranks are places among them."""
    if config.target.device_type != "cuda":
        return 0
    engine = config.engine if config.uses_engine else None
    return 1 + max([*config.target.gpu_ranks, *(engine.gpu_ranks if engine else ())])
