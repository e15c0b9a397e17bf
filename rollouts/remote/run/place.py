"""What a resumed run starts from, put into its directory on the host: links to what lies there, else sent from here."""

import json
import posixpath
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.host.read_answer import read_answer
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import Transport
from rollouts.remote.run.registry import START, RunEntry
from rollouts.view.reporter import Say

HASH_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Placed:
    """A checkpoint of an earlier run, and where the new run has it."""

    at: str  # on the host, in the new run's directory
    here: str  # in the mirror of the run that wrote it
    there: str  # on the same host, in that run's directory; "" on another host


def start_text(places: Sequence[Placed], resumed_from: dict[str, Any]) -> str:
    """Return start.json, the part of a run's record that says what it starts from."""
    return json.dumps({"resumed_from": resumed_from, "places": [asdict(place) for place in places]}, indent=1) + "\n"


def read_places(entry: RunEntry) -> list[Placed]:
    """Return what a run's record says that it starts from; [] for one that resumes nothing."""
    try:
        found = json.loads(read_plain(entry.record.path / START))
    except FileNotFoundError:
        return []
    return [Placed(**place) for place in found["places"]]


def place_all(entry: RunEntry, transport: Transport, python: str, say: Say) -> None:
    """Have every checkpoint that the run starts from in its directory, whole. Done twice, it changes nothing."""
    for place in read_places(entry):
        _place(place, transport, python, say)


def _place(place: Placed, transport: Transport, python: str, say: Say) -> None:
    if not problems_there(transport, python, place.at):
        return
    build = f"{posixpath.dirname(place.at)}/.{posixpath.basename(place.at)}.part"
    if place.there and _linked(place, transport, build) and not problems_there(transport, python, build):
        say("resume", f"{place.there} is where the run starts")
    else:
        say("resume", f"sending {place.here} to {transport.target}")
        _send(place, transport, build)
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
    return transport.run(["sh", "-c", script, "sh", place.there, build], timeout_s=HASH_TIMEOUT_S).returncode == 0


def _send(place: Placed, transport: Transport, build: str) -> None:
    _shell(transport, 'mkdir -p "$1"', build)
    options = ["-rt", "--no-links", "--partial", "--delete", "--checksum", "--chmod=D700,F600"]
    done = run_rsync(transport, [*options, f"{place.here}/", transport.rsync_path(f"{build}/")], timeout_s=None)
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
    answer = read_answer(transport.target, f"whether {directory} is whole", done.out, {"problems": list[str]})
    return [str(problem) for problem in answer["problems"]]


def _shell(transport: Transport, script: str, *arguments: str) -> None:
    done = transport.run(["sh", "-c", script, "sh", *arguments], timeout_s=60)
    if done.returncode != 0:
        raise DeployError(f"{transport.target}: no room can be made for the run.", found=done.err[-500:])
