"""What a resumed run starts from, put into its directory on the host: links to what lies there, else sent from here."""

import json
import posixpath
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.host.read_answer import read_answer
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import Transport
from rollouts.remote.run.registry import START, RunEntry
from rollouts.remote.run.sync_code import IDLE_TIMEOUT_S, Sending, Upload
from rollouts.view.reporter import Say

HASH_TIMEOUT_S = 3600.0
REFERENCE = "reference"  # what the frozen model is called in the new run's directory


@dataclass(frozen=True)
class Placed:
    """A checkpoint of an earlier run, and where the new run has it."""

    at: str  # on the host, in the new run's directory
    here: str  # in the mirror of the run that wrote it
    there: str  # on the same host, in that run's directory; "" on another host


def start_text(places: Sequence[Placed], resumed_from: dict[str, Any]) -> str:
    """Return start.json, the part of a run's record that says what it starts from."""
    return (
        json.dumps(
            {"resumed_from": resumed_from, "places": [asdict(place) for place in places]}, indent=1
        )
        + "\n"
    )


def read_places(entry: RunEntry) -> list[Placed]:
    """Return what a run's record says that it starts from; [] for one that resumes nothing."""
    try:
        found = json.loads(read_plain(entry.record.path / START))
    except FileNotFoundError:
        return []
    return [Placed(**place) for place in found["places"]]


def frozen_model(old: RunEntry, config: Config, named: str | None) -> str | Path | None:
    """Return the frozen model of the KL penalty: a checkpoint that is here, or a name that the host can follow.

    It is what the rl stage began with, by this machine's record. The trainer compares its weights with what the
    checkpoint says of them.
    """
    for place in read_places(old):
        if place.at in (named, config.output.source_checkpoint if named is None else None):
            return Path(place.here)
    if named is not None:
        return named
    if "sft" in config.stages:
        steps = sorted((old.mirror.checkpoints / "sft").glob("step_*"), key=lambda path: path.name)
        return steps[-1] if steps else None
    return config.output.source_checkpoint or config.model.name


def place_all(entry: RunEntry, transport: Transport, python: str, say: Say, upload: Upload) -> None:
    """Have every checkpoint that the run starts from in its directory, whole. Done twice, it changes nothing.

    Of several hosts the first has all of them, and brings what a stage starts from to the others; these need the frozen
    model of a KL penalty beside it, at the same path.
    """
    for place in read_places(entry):
        if entry.rank == 0 or posixpath.basename(place.at) == REFERENCE:
            _place(place, transport, python, say, upload)


def _place(place: Placed, transport: Transport, python: str, say: Say, upload: Upload) -> None:
    if not problems_there(transport, python, place.at):
        return
    build = f"{posixpath.dirname(place.at)}/.{posixpath.basename(place.at)}.part"
    if (
        place.there
        and _linked(place, transport, build)
        and not problems_there(transport, python, build)
    ):
        say("resume", f"{place.there} is where the run starts")
    else:
        say("resume", f"sending {place.here} to {transport.target}")
        _send(place, transport, build, say, upload)
        if problems := problems_there(transport, python, build):
            raise DeployError(
                f"{transport.target}: the checkpoint did not arrive whole.",
                found="\n".join(problems),
                fix="run the same command again",
            )
    _shell(transport, 'rm -rf "$2" && mv "$1" "$2"', build, place.at)


def _linked(place: Placed, transport: Transport, build: str) -> bool:
    """Link the host's own files: neither run writes to a finished checkpoint."""
    script = 'rm -rf "$2" && mkdir -p "$2" && { cp -al "$1/." "$2" || cp -a "$1/." "$2"; }'
    return (
        transport.run(
            ["sh", "-c", script, "sh", place.there, build], timeout_s=HASH_TIMEOUT_S
        ).returncode
        == 0
    )


def _send(place: Placed, transport: Transport, build: str, say: Say, upload: Upload) -> None:
    """Send it, or go on: files grow in place, none of which has another name, so a kill -9 of rsync keeps them."""
    drop_links = 'mkdir -p "$1" && find "$1" -type f -links +1 -exec rm -f {} +'
    _shell(transport, drop_links, build)
    options = ["-rt", "--no-links", "--inplace", "--delete", "--checksum", "--chmod=D700,F600"]
    size = sum(file.stat().st_size for file in Path(place.here).rglob("*") if file.is_file())
    sending = Sending(size, say, upload)
    done = run_rsync(
        transport,
        [
            *options,
            f"--timeout={IDLE_TIMEOUT_S:.0f}",
            f"{place.here}/",
            transport.rsync_path(f"{build}/"),
        ],
        timeout_s=None,
        on_output=sending.read,
        keep_open=upload.keep_open,
    )
    if done.returncode != 0:
        raise DeployError(
            f"{transport.target}: the checkpoint could not be sent.",
            found=done.err[-1500:] or f"rsync's exit code {done.returncode}",
            fix="run the same command again: it goes on with what was sent",
        )


def problems_there(transport: Transport, python: str, directory: str) -> list[str]:
    """Return why a directory on the host is not what its manifest says; [] if it is."""
    argv, program = sent_program(python, "rollouts.worker.check_manifest", directory)
    done = transport.run(argv, stdin=program, timeout_s=HASH_TIMEOUT_S)
    answer = read_answer(
        transport.target, f"whether {directory} is whole", done.out, {"problems": list[str]}
    )
    return [str(problem) for problem in answer["problems"]]


def _shell(transport: Transport, script: str, *arguments: str) -> None:
    done = transport.run(["sh", "-c", script, "sh", *arguments], timeout_s=60)
    if done.returncode != 0:
        raise DeployError(
            f"{transport.target}: no room can be made for the run.", found=done.err[-500:]
        )
