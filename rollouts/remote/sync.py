"""The code on its way to the host: exactly git's files, into a fresh directory of the run.

Files that did not change since the last run of this project there are hard links to it, so they cost neither time nor
space; what was deleted here is simply not there. The tree gets its name only when it is whole.
"""

import os
import secrets

from rollouts.remote.errors import DeployError
from rollouts.remote.transport import Transport, disk_full, run_rsync

RSYNC_FILE_ERROR = 11  # reading or writing a file failed, on either side

# $1 run path, $2 the link to the project's last tree, $3 where this one is built
_PREPARE = """
umask 077; mkdir -p "$1/code" "$(dirname "$2")" "$3" || exit 1
[ -d "$1/code/tree" ] && echo "state=complete"
[ -d "$2/." ] && echo "last=$(cd "$2" && pwd -P)"
exit 0
"""
# $1 run path, $2 the link, $3 the finished build; what interrupted attempts left goes too
_FINISH = """
[ -d "$1/code/tree" ] || mv "$3" "$1/code/tree" || exit 1
rm -rf "$1"/code/.tree-*
ln -sfn "$1/code/tree" "$2"
"""


def sync_code(
    transport: Transport,
    *,
    root: os.PathLike[str],
    files: tuple[str, ...],
    project: str,
    home: str,
    run_path: str,
    timeout_s: float,
) -> bool:
    """Bring `files` of `root` to `<run_path>/code/tree`. False when a whole tree was there already: it stays."""
    link = f"{home}/code/{project}"
    build = f"{run_path}/code/.tree-{secrets.token_hex(4)}"
    prepared = _shell(transport, _PREPARE, run_path, link, build)
    answers = dict(line.partition("=")[::2] for line in prepared.splitlines())
    if "state" not in answers:
        last = answers.get("last")
        options = ["-lpt", "--from0", "--files-from=-", *([f"--link-dest={last}"] if last else [])]
        # "./": a name that starts with # or ; would be taken for a comment
        names = b"".join(b"./" + os.fsencode(name) + b"\0" for name in files)
        arguments = [*options, f"{os.fspath(root)}/", transport.rsync_path(f"{build}/")]
        done = run_rsync(transport, arguments, stdin=names, timeout_s=timeout_s)
        if done.returncode == RSYNC_FILE_ERROR and not done.err:
            _refuse_full_disk(transport, build, sum(os.lstat(os.path.join(root, name)).st_size for name in files))
        if done.returncode != 0:
            raise DeployError(
                f"{transport.target}: the code could not be sent.",
                found=done.err[-1500:],
                fix="if files were changing just now, run the same command again",
            )
    _shell(transport, _FINISH, run_path, link, build)
    return "state" not in answers


def _refuse_full_disk(transport: Transport, directory: str, size: int) -> None:
    """Raise where what was to be sent does not fit: the words of a receiver that dies of it are sometimes lost."""
    free = int(_shell(transport, "df -Pk \"$1\" | awk 'NR == 2 { print $4 }'", directory)) * 1024
    if size > free:
        raise disk_full(transport.target, f"{size} bytes to send, {free} free in {directory}")


def _shell(transport: Transport, script: str, *arguments: str) -> str:
    done = transport.run(["sh", "-c", script, "sh", *arguments], timeout_s=60)
    if "No space left on device" in done.err:
        raise disk_full(transport.target, done.err)
    if done.returncode != 0:
        raise DeployError(
            f"{transport.target}: no room can be made for the run in {arguments[0]}.",
            found=done.err[-500:],
            fix="check who owns that directory; ROLLOUTS_HOME on the host names another place",
        )
    return done.out
