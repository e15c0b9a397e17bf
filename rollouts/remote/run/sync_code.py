"""The code on its way to the host: exactly git's files, into a fresh directory of the run; so rollouts itself.

Content decides. Files that the last run of this project has there, byte for byte, become hard links to it, so they cost
neither time nor space; what was deleted here is simply not there. Before the tree gets its name, the host hashes what
lies in it, and that must be what was hashed here.

Files grow in place, so that whatever cuts an upload off, a kill -9 of either rsync too, the next one goes on at the
byte where it broke.
"""

import inspect
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rollouts import manifest
from rollouts.manifest import Tree, read_tree, tree_differences, tree_digest
from rollouts.remote.errors import DeployError, unreadable
from rollouts.remote.host.read_answer import read_answer, read_count
from rollouts.remote.host.rsync import disk_full, run_rsync
from rollouts.remote.host.transport import Transport
from rollouts.view.reporter import Say, silent

RSYNC_FILE_ERROR = 11  # reading or writing a file failed, on either side
IDLE_TIMEOUT_S = 300.0  # a transfer in which no byte moves for so long is given up; it may take as long as it needs
HASH_BYTES_PER_S = 10e6  # a slow disk's
CHANGED_MEANWHILE = "the code changed while it was being sent."
SHELL_TIMEOUT_S = 300.0  # leftovers of gigabytes may have to go
PROGRESS_BYTES_MIN = 20e6  # less is sent within seconds
LINK_TREES_MAX = 4  # earlier uploads that were cut off, whose files are taken over

# $1 run path, $2 the link to the project's last tree, $3 where this one is built, $4 the rollouts home, $5 "tree"
# or "package", $6 not empty: the link is to lead to this one.
# Files in $3 that are links to other trees go: they come back as links, and nothing of another run is touched.
_PREPARE = """
umask 077; mkdir -p "$1/code" "$(dirname "$2")" || exit 1
[ -d "$1/code/$5" ] && { echo "state=complete"; exit 0; }
for old in "$1"/code/."$5"-*; do case $old in */."$5"-build*) ;; *) rm -rf "$old" ;; esac; done
[ -d "$3" ] && echo "state=resumed"
mkdir -p "$3" || exit 1
find "$3" -type f -links +1 -exec rm -f {} +
[ -d "$2/." ] && echo "link=$(cd "$2" && pwd -P)"
for other in "$4"/runs/*/code/."$5"-build*; do [ "$other" = "$3" ] || [ ! -d "$other" ] || echo "link=$other"; done
exit 0
"""
# The same arguments; uploads that were not resumed for a week go too. $7 Python, whose program hashes what lies there,
# $8 the digest that it has to find, else all stays as it is. One call: a round trip may take a third of a second.
_FINISH = """
if [ "$8" ]; then
  found=$("$7" -IS -) || exit 1
  printf '%s\\n' "$found"
  case $found in *"\\"digest\\": \\"$8\\""*) ;; *) exit 0 ;; esac
fi
if [ -d "$1/code/$5" ]; then [ -d "$3" ] && echo "state=another's"; else mv "$3" "$1/code/$5" || exit 1; fi
rm -rf "$1"/code/."$5"-*
[ -z "$6" ] || ln -sfn "$1/code/$5" "$2"
find "$4"/runs/*/code -maxdepth 1 -name ".$5-*" -mtime +7 -exec echo old={} \\; -exec rm -rf {} + 2>/dev/null
exit 0
"""


@dataclass(frozen=True, kw_only=True)
class CodePlace:
    """Where a run's code lies on the host. Each deploy builds in a directory named by its `launch_id`."""

    home: str  # the rollouts home
    run_path: str
    project: str
    launch_id: str = ""
    name: Literal["tree", "package"] = (
        "tree"  # package: rollouts itself, beside the user's repository
    )
    stays: bool = True  # the next tree of the project may be made of links to this one

    @property
    def whole(self) -> str:
        return f"{self.run_path}/code/{self.name}"

    @property
    def link(self) -> str:
        """Return the path of the link to the project's last tree."""
        return f"{self.home}/code/{self.project}"

    @property
    def build(self) -> str:
        return f"{self.run_path}/code/.{self.name}-build{'-' if self.launch_id else ''}{self.launch_id}"

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.run_path, self.link, self.build, self.home, self.name, "1" if self.stays else ""


@dataclass
class Upload:
    """What all tries of one upload share: descriptors that its rsyncs hold too, and how much they have sent."""

    keep_open: tuple[int, ...] = ()
    sent_bytes: int = 0


def sync_code(
    transport: Transport,
    place: CodePlace,
    *,
    root: os.PathLike[str],
    files: tuple[str, ...],
    timeout_s: float = IDLE_TIMEOUT_S,
    python: str = "python3",
    expected: Tree | None = None,
    say: Say = silent,
    upload: Upload | None = None,
) -> bool:
    """Bring `files` of `root` to `place`. False when a whole tree was there already: it stays.

    `expected`: the tree that the run was planned with; None: as the files are now, and a whole tree that is there stays
    unchecked. Raises DeployError unless exactly that lies on the host. A transfer may be idle for `timeout_s`.
    """
    answers = _Answers.parse(_shell(transport, _PREPARE, *place.arguments))
    complete = answers.state == "complete"
    if not complete:
        if expected is None:
            expected = _hash_files(root, files)
        else:
            _refuse_changed_files(
                root, expected, "the code here is not the code that this run was planned with."
            )
        sending = Sending(size_of(expected), say, upload or Upload())
        _transfer(
            transport, root, expected, place, answers=answers, sending=sending, timeout_s=timeout_s
        )
    if expected is None:
        ended = _shell(transport, _FINISH, *place.arguments)
    else:
        say("sync", f"checking {len(expected)} files on {transport.target} by content")
        ended = _check(transport, python, place, expected, root=None if complete else root)
    for line in ended.splitlines():
        key, _, value = line.partition("=")
        # another deploy of this name was faster: what it sent lies there
        if key == "state" and expected is not None:
            _check(transport, python, place, expected, root=None)
        if key == "old":
            say("sync", f"removed {value}: an upload that was not resumed for a week")
    return not complete


@dataclass(frozen=True)
class _Answers:
    """What the host has of this run's code, and trees whose files may be taken over."""

    state: str  # "complete", "resumed", "" for a fresh one
    links: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "_Answers":
        pairs = [line.partition("=")[::2] for line in text.splitlines()]
        states = [value for key, value in pairs if key == "state"]
        return cls(
            states[0] if states else "", tuple(value for key, value in pairs if key == "link")
        )


def _transfer(
    transport: Transport,
    root: os.PathLike[str],
    tree: Tree,
    place: CodePlace,
    *,
    answers: _Answers,
    sending: "Sending",
    timeout_s: float,
) -> None:
    """Send `tree` into the build directory with one rsync. A part of a file stays there, for the next try."""
    kept = ", going on with what an earlier try sent" if answers.state == "resumed" else ""
    sending.say(
        "sync",
        f"{len(tree)} files, {sending.size / 1e6:.1f} MB, to {transport.target}:{place.whole}{kept}",
    )
    links = [f"--link-dest={link}" for link in answers.links[:LINK_TREES_MAX]]
    # in place: nothing there has another name (_PREPARE), and rsync writes to none that it linked itself
    options = ["-lptc", "--inplace", "--force", f"--timeout={timeout_s:.0f}"]
    # "./": a name that starts with # or ; would be taken for a comment
    names = b"".join(b"./" + name.encode(errors="surrogateescape") + b"\0" for name in sorted(tree))
    source = [f"{os.fspath(root)}/", transport.rsync_path(f"{place.build}/")]
    done = run_rsync(
        transport,
        [*options, *links, "--from0", "--files-from=-", *source],
        stdin=names,
        timeout_s=None,
        on_output=sending.read,
        keep_open=sending.upload.keep_open,
    )
    if done.returncode == RSYNC_FILE_ERROR:
        _refuse_full_disk(transport, place.build, sending.size)
    if done.returncode != 0:
        _refuse_changed_files(root, tree, CHANGED_MEANWHILE)
        raise DeployError(
            f"{transport.target}: the code could not be sent.",
            found=done.err[-1500:] or f"rsync's exit code {done.returncode}",
            fix="run the same command again: it goes on with what was sent",
        )
    sending.end()


def size_of(tree: Tree) -> int:
    """Return the bytes of a tree's files."""
    return sum(file["size"] for file in tree.values())


class Sending:
    """rsync's own progress, said each time that another tenth of the bytes has gone, and at the end."""

    _LINE = re.compile(r"^\s*([\d.,']+)\s+(\d+)%\s+(\S+/s)")

    def __init__(self, size: int, say: Say, upload: Upload) -> None:
        self.size, self.say, self.upload, self._tenth = size, say, upload, 0
        self._last: tuple[int, str] | None = None  # (bytes, rate) that rsync told last

    def read(self, text: str) -> None:
        """Read a line of rsync's, such as `  12,345,678  45%  11.22MB/s  0:00:10`."""
        if (match := self._LINE.match(text)) is None:
            return
        sent, rate = int(re.sub(r"\D", "", match[1])), match[3]
        self.upload.sent_bytes += max(0, sent - (self._last[0] if self._last else 0))
        self._last = sent, rate
        tenth = 10 * sent // max(1, self.size)
        if tenth > self._tenth and self.size > PROGRESS_BYTES_MIN:
            self._tenth = tenth
            self.say("sync", f"{sent / 1e6:.1f} of {self.size / 1e6:.1f} MB sent, {rate}")

    def end(self) -> None:
        if self._last is None:  # an rsync that tells no progress
            self.say("sync", "sent, but for what was there")
            return
        sent, rate = self._last
        self.say(
            "sync",
            f"{sent / 1e6:.1f} MB sent{f', {rate}' if rate else ''}; the rest was there",
        )


def _hash_files(
    root: os.PathLike[str], files: Iterable[str], *, grown_from: Tree | None = None
) -> Tree:
    try:
        return read_tree(root, files, grown_from=grown_from)
    except OSError as error:
        raise unreadable(error) from None


def _refuse_changed_files(root: os.PathLike[str], planned: Tree, message: str) -> None:
    """Raise where files here are no longer what they were when they were hashed. One that only grew may be sent."""
    there = [name for name in planned if os.path.lexists(os.path.join(root, name))]
    if differences := tree_differences(planned, _hash_files(root, there, grown_from=planned)):
        raise DeployError(
            message,
            found="\n".join(differences),
            needed="the files as they were when they were hashed: a run's record says what ran",
            fix="deploy CONFIG sends them as they are now; let git ignore files that programs keep rewriting",
        )


def _check(
    transport: Transport,
    python: str,
    place: CodePlace,
    expected: Tree,
    *,
    root: os.PathLike[str] | None,
) -> str:
    """Raise unless the host's finished tree, or with `root` what was built there from those files, is `expected`.

    What was built gets its name; returns what was said of that.
    """
    tree = place.whole if root is None else place.build
    found = _check_there(transport, python, place, expected, prune=root is not None)
    if found.digest == tree_digest(expected):
        return found.ended
    if root is not None:
        _refuse_changed_files(root, expected, CHANGED_MEANWHILE)
    raise DeployError(
        f"{transport.target}: what lies there is not the code that was planned.",
        found="\n".join([tree, *found.differences]),
        needed=f"the tree with the digest {tree_digest(expected)}",
        fix="start it anew: deploy CONFIG",
    )


@dataclass(frozen=True)
class _Found:
    digest: str
    differences: tuple[str, ...]
    ended: str  # what _FINISH said, where the digest is the right one


def _check_there(
    transport: Transport, python: str, place: CodePlace, expected: Tree, *, prune: bool
) -> _Found:
    """Have the host hash the tree, and give it its name if it is `expected`; `prune`: it was built just now.

    The program brings its own code: what lies there is what is being checked.
    """
    directory = place.build if prune else place.whole
    call = f"check_tree({directory!r}, json.loads({json.dumps(expected)!r}), prune={prune})"
    program = f"{inspect.getsource(manifest)}\nprint('\\ntree=' + json.dumps({call}))\n"
    timeout_s = SHELL_TIMEOUT_S + size_of(expected) / HASH_BYTES_PER_S
    words = *place.arguments, python, tree_digest(expected)
    argv = ["sh", "-c", _FINISH, "sh", *words]
    done = transport.run(argv, stdin=program.encode(), timeout_s=timeout_s)
    if "No space left on device" in done.err:
        raise disk_full(transport.target, done.err)
    if done.returncode != 0:
        raise DeployError(
            f"{transport.target}: the code there could not be checked and put in its place.",
            found=done.err[-1000:] or f"exit code {done.returncode}, no message",
            needed=f"{python}, 3.10 or newer, to hash {directory}",
        )
    fields = {"digest": str, "differences": list[str]}
    answer = read_answer(
        transport.target, f"what code lies in {directory}", done.out, fields, prefix="tree="
    )
    ended = done.out.partition("\ntree=")[2].partition("\n")[2]
    return _Found(answer["digest"], tuple(answer["differences"]), ended)


def _refuse_full_disk(transport: Transport, directory: str, size: int) -> None:
    """Raise where what was to be sent does not fit: the words of a receiver that dies of it are sometimes lost."""
    said = _shell(transport, "df -Pk \"$1\" | awk 'NR == 2 { print $4 }'", directory)
    free = read_count(transport.target, f"how much is free in {directory}", said) * 1024
    if size > free:
        raise disk_full(transport.target, f"{size} bytes to send, {free} free in {directory}")


def _shell(transport: Transport, script: str, *arguments: str) -> str:
    done = transport.run(["sh", "-c", script, "sh", *arguments], timeout_s=SHELL_TIMEOUT_S)
    if "No space left on device" in done.err:
        raise disk_full(transport.target, done.err)
    if done.returncode != 0:
        raise DeployError(
            f"{transport.target}: no room can be made for the run in {arguments[0]}.",
            found=done.err[-500:] or f"exit code {done.returncode}, no message",
            fix="check who owns that directory; ROLLOUTS_HOME on the host names another place",
        )
    return done.out
