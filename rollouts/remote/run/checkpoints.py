"""Checkpoints on their way here: each under a hidden name until its manifest holds. What has a name is whole."""

import contextlib
import os
import queue
import re
import shlex
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from rollouts.manifest import MANIFEST_FILE, manifest_problems, read_manifest, sha256
from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.host.rsync_here import pull_rsync
from rollouts.remote.host.transport import Transport
from rollouts.remote.local_faults import os_problem, unexpected
from rollouts.remote.run.mirror_files import check_checkpoint, directory, make_mirror, remove_tree
from rollouts.run_dir import RunDir

HASH_TIMEOUT_S = 3600.0
BACKGROUND_TRIES = 4


def pull_checkpoint(transport: Transport, run_path: str, run: RunDir, path: str) -> Path:
    """Bring one completed checkpoint here, verified against its manifest. Returns its directory, made once."""
    final = run.path / check_checkpoint(path)
    make_mirror(run.path)
    with directory(run.path, PurePosixPath(path).parts[:-1]):
        pass  # made, and no link: rsync is given a path
    if not final.is_symlink() and final.is_dir():
        _point_latest(final)
        return final
    partial = _partial(final)
    if partial.is_symlink() or not partial.is_dir():
        remove_tree(partial)
        partial.mkdir(0o700)
    source = f"{run_path}/{path}"
    # On this machine a hard link is as good as a copy: neither side writes to a finished checkpoint
    links = [f"--link-dest={source}"] if isinstance(transport, LocalTransport) else []
    modes = [] if links else ["--chmod=D700,F600"]
    options = ["-rt", "--no-links", "--partial", "--delete", *modes, *links]
    done = pull_rsync(transport, [*options, transport.rsync_path(f"{source}/"), f"{partial}/"], partial)
    if done.returncode != 0:
        raise DeployError(f"{transport.target}: {path} could not be pulled.", found=done.err[-1500:], started=True)
    if problems := manifest_problems(partial):
        raise _damaged(transport, source, partial, run, problems)
    partial.rename(final)
    _point_latest(final)
    return final


def _damaged(transport: Transport, source: str, partial: Path, run: RunDir, problems: tuple[str, ...]) -> DeployError:
    """Return why what came is not what the manifest says: the host's own files, or the way here. Drops it."""
    path = "/".join(PurePosixPath(source).parts[-3:])
    found = "\n".join(problem.replace(f"{partial}/", "") for problem in problems)
    there = _same_on_host(transport, source, partial)
    remove_tree(partial)  # so that the next try starts clean
    if there:
        return DeployError(
            f"{path} arrived damaged: it is damaged on the host, where its files are not what its manifest says.",
            found=found,
            fix="use another checkpoint; pulling again brings the same files",
            started=True,
        )
    return DeployError(f"{path} arrived damaged.", found=found, fix=f"deploy pull {run.run_id}", started=True)


def _same_on_host(transport: Transport, source: str, partial: Path) -> bool:
    """Return whether the host holds exactly what arrived; False also if it does not answer."""
    names = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
    if any("\n" in name or "\\" in name for name in names):
        return False
    with contextlib.suppress(ValueError, FileNotFoundError):
        expected = read_manifest(partial / MANIFEST_FILE)
        names = [name for name in names if name in expected or name == MANIFEST_FILE]
        if any(name not in names for name in expected):  # a file that did not come: is it there?
            probe = " && ".join(f"[ ! -f {shlex.quote(name)} ]" for name in expected if name not in names)
            done = transport.run(["sh", "-c", probe], cwd=source, timeout_s=HASH_TIMEOUT_S)
            if done.returncode != 0:
                return False
    try:
        done = transport.run(["sha256sum", "--", *names[:500]], cwd=source, timeout_s=HASH_TIMEOUT_S)
    except TransportError:
        return False
    theirs = {name: digest for digest, _, name in (line.partition("  ") for line in done.out.splitlines())}
    return done.returncode == 0 and all(theirs.get(name) == sha256(partial / name) for name in names[:500])


def drop_partial(run: RunDir, path: str) -> None:
    """Clear what had come of a checkpoint that the run removed meanwhile; one that is here whole stays."""
    partial = _partial(run.path / check_checkpoint(path))
    if os.path.lexists(partial):
        remove_tree(partial)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _point_latest(checkpoint: Path) -> None:
    """Point `latest` to the newest checkpoint that is here; step numbers are compared as numbers."""
    latest = checkpoint.parent / "latest"
    steps = [p for p in checkpoint.parent.glob("step_*") if p.is_dir() and re.fullmatch(r"step_[0-9]{1,12}", p.name)]
    newest = max(steps, key=lambda path: int(path.name.removeprefix("step_")))
    temporary = latest.with_name(f".latest.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(newest.name)
    temporary.replace(latest)


class CheckpointPuller:
    """Pulls checkpoints in the background, one at a time, in the order of their events.

    A connection that is lost meanwhile is tried again; every failure is told to `say`, and all are tried once more by
    the last pull.
    """

    def __init__(
        self,
        transport: Transport,
        run_path: str,
        run: RunDir,
        say: Callable[[str, str], None] = lambda phase, text: None,
        pause_s: Callable[[int], float] = lambda failures: 0.0,
    ) -> None:
        self._transport, self._run_path, self._run, self._say, self._pause_s = transport, run_path, run, say, pause_s
        self._paths: queue.Queue[str | None] = queue.Queue()
        self._finishing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, path: str) -> None:
        self._paths.put(path)

    def finish(self) -> None:
        """Wait until all that were added have been tried."""
        self._finishing.set()
        self._paths.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (path := self._paths.get()) is not None:
            for tries in range(1, BACKGROUND_TRIES + 1):
                lost = self._try(path)
                if not lost or self._finishing.wait(self._pause_s(tries)):
                    break

    def _try(self, path: str) -> bool:
        """Try to pull one. Returns whether the connection was lost, so that another try may help."""
        try:
            pull_checkpoint(self._transport, self._run_path, self._run, path)
        except TransportError as error:
            self._say("pull", f"{path}: {error}")
            return error.lost
        except DeployError as error:
            self._say("pull", f"{error}")
        except OSError as error:
            self._say("pull", f"{path}: {os_problem(error).message}")
        except Exception as error:  # a bug: told, and the thread goes on with the next
            told = unexpected(error)
            self._say("pull", f"{path}: {told}; {told.problems[0].found}")
        return False
