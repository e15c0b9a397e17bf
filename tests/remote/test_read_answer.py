"""What a host answers: found among noise, its fields checked, bounded; anything else is one message about that host."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.manifest import read_tree
from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host import framing
from rollouts.remote.host.facts import gather_facts, parse_facts
from rollouts.remote.host.framing import EndlessLineError, FrameReader, LineSplitter, new_frame
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.host.read_answer import MalformedError, checked, read_answer, read_count
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.transport import Completed
from rollouts.remote.run import sync_code as sync
from rollouts.remote.run.execute import read_launch_answer
from rollouts.remote.run.follow import read_message
from rollouts.remote.run.mirror import Mirror
from rollouts.run_dir import RunDir
from tests.remote.hosts import Host, Laptop
from tests.remote.test_ssh import transport_to


class Answering(LocalTransport):
    """A host that answers every command with the same text."""

    target = "gpu-7"

    def __init__(self, out: str) -> None:
        self.out = out

    def run(self, argv: Any, **options: Any) -> Completed:
        return Completed(0, self.out.encode(), b"")


def refused(action: Callable[[], object], *, started: bool = False) -> str:
    with pytest.raises(DeployError) as caught:
        action()
    assert caught.value.started is started
    text = caught.value.text()
    assert (
        text.startswith("error: gpu-7: ")
        and "found" in text
        and "fix" in text
        and "It said: " in text
    )
    return text


ODD = [
    "",
    "null",
    "17",
    "[]",
    "{}",
    '"text"',
    "{",
    "[" * 100_000,
    '{"a": 1',
    "\x00\x1b[2J",
    "9" * 5000,
]


DIGESTS = [
    json.dumps({"digest": value, "differences": []})
    for value in (None, 7, [], {}, [1], {"a": 1}, True, 1e400)
]

PLACE = sync.CodePlace(home="/h", run_path="/r", project="p")


@pytest.mark.parametrize("said", [*ODD, *DIGESTS])
def test_the_answer_about_the_code(said: str, tmp_path: Path) -> None:
    """Goal: what the host says of its code tree is checked. Red with answer["digest"]: KeyError, "deploy itself
    failed"."""
    (tmp_path / "f").write_text("x")
    tree = read_tree(tmp_path, ["f"])
    text = refused(
        lambda: sync._check_there(Answering(f"tree={said}\n"), "python3", PLACE, tree, prune=False)
    )
    assert "what code lies in /r/code/tree" in text


@pytest.mark.parametrize("value", ["text", [1], [[]], {"a": "b"}, None])
def test_differences_that_are_no_list_of_text(value: object, tmp_path: Path) -> None:
    """Goal: every field of the answer has its type. Red with tuple(answer["differences"]): letters of a text."""
    answer = json.dumps({"digest": "d", "differences": value})
    refused(
        lambda: sync._check_there(Answering(f"tree={answer}"), "python3", PLACE, {}, prune=False)
    )


@pytest.mark.parametrize("said", ["", "much", "-1", "1.5", "1 2", "9" * 5000, "²", "0x10", "None"])
def test_the_room_on_a_disk(said: str) -> None:
    """Goal: df's answer is a number or an error with the host's words. Red with int(): ValueError."""
    assert "how much is free in /d" in refused(
        lambda: sync._refuse_full_disk(Answering(said), "/d", 1)
    )
    assert read_count("gpu-7", "x", " 17\n") == 17


@pytest.mark.parametrize(
    "said",
    [
        *ODD,
        '{"started": "yes"}',
        '{"started": null}',
        '{"started": false, "same": 7}',
        '{"started": false, "reason": []}',
    ],
)
def test_the_answer_to_a_launch(said: str) -> None:
    """Goal: no odd answer counts as started, nor as nothing started. Red with any object with `started` taken."""
    refused(lambda: read_launch_answer("gpu-7", said), started=True)


@pytest.mark.parametrize(
    "said",
    [
        *ODD,
        '{"state": 7, "exit_code": 0}',
        '{"state": "done", "exit_code": "0"}',
        '{"state": "done"}',
    ],
)
def test_the_answer_to_a_stop(said: str) -> None:
    """Goal: the same for `stop`. Red with the exit code shown whatever it is."""
    fields = {"state": str, "exit_code": int | None}
    refused(lambda: read_answer("gpu-7", "the stop", said, fields, started=True), started=True)


PROBE = {
    **{
        "python": "/p",
        "python_version": "3.11.2",
        "platform": "linux",
        "has_venv": True,
        "disk_free_bytes": 1,
    },
    **{
        "ports_in_use": [],
        "paths": {},
        "environments": [],
        "run_exists": False,
        "runs": [],
        "pythons": [],
        "free_port": None,
    },
}
ROW = {
    **{
        "run_id": "r",
        "experiment_name": "e",
        "state": "done",
        "stage": None,
        "step": None,
        "started_at": 1.0,
    },
    **{
        "updated_at": 1,
        "exit_code": 0,
        "message": "",
        "live": False,
        "launched": True,
        "launch_id": None,
    },
    **{"ports": [], "host": None},
}


def changes(good: dict[str, Any]) -> list[tuple[str, Any]]:
    """Each field missing, and with a type that is none of its."""
    wrong = {str: 7, bool: "yes", int: "1", float: "now", list: "a list", dict: [], type(None): [1]}
    return [
        *((name, ...) for name in good),
        *((name, wrong[type(value)]) for name, value in good.items()),
    ]


def changed(good: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    rest = {key: other for key, other in good.items() if key != name}
    return rest if value is ... else {**rest, name: value}


@pytest.mark.parametrize(("name", "value"), changes(PROBE))
def test_a_probe_with_another_field(name: str, value: Any) -> None:
    """Goal: each field of what a host says of itself is there and has its type. Red with HostFacts(**probe)."""
    said = json.dumps(changed(PROBE, name, value))
    text = refused(lambda: gather_facts(Answering(f"home=/h\nprobe={said}\n")))
    assert f"probe.{name}" in text


@pytest.mark.parametrize(("name", "value"), changes(ROW))
def test_a_row_with_another_field(name: str, value: Any) -> None:
    """Goal: the same for each run of the host: its readers take the fields as they are. Red with rows passed on: a
    KeyError in `ls`, in the plan, in `status`."""
    said = json.dumps({**PROBE, "runs": [ROW, changed(ROW, name, value)]})
    assert f"probe.runs[1].{name}" in refused(
        lambda: gather_facts(Answering(f"home=/h\nprobe={said}\n"))
    )


@pytest.mark.parametrize("said", ODD)
def test_a_probe_that_is_none(said: str) -> None:
    """Goal: a probe that is not a JSON object is an error about the host. Red with a RecursionError let through."""
    refused(lambda: gather_facts(Answering(f"home=/h\nprobe={said}\n")))


def test_fields_of_a_later_version_are_passed_over() -> None:
    """Goal: a field that was not asked for does no harm. Red with HostFacts(**probe): TypeError."""
    facts = parse_facts(
        [("home", "/h"), ("probe", json.dumps({**PROBE, "new": 1, "runs": [{**ROW, "new": 1}]}))]
    )
    assert facts.python == "/p" and facts.runs[0]["run_id"] == "r"


def test_output_without_a_line_s_end_before_the_probe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: what the host's Python prints as it starts, without a line's end, hides no answer. Red with "probe=" not
    on a line of its own: a host with Python and no runs."""
    noisy = tmp_path / "bin"
    noisy.mkdir()
    # -Ic are the questions for the version; the probe comes over stdin
    (noisy / "python3").write_text(
        f'#!/bin/sh\n[ "$2" = - ] && printf "loading modules..."\nexec {sys.executable} "$@"\n'
    )
    (noisy / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{noisy}:/usr/bin:/bin")
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    assert gather_facts(LocalTransport()).python_version.startswith("3.")


@pytest.mark.parametrize(
    ("value", "kind", "good"),
    [
        *(
            (1, int, True),
            (True, int, False),
            (1.0, int, False),
            (1, float, True),
            (float("nan"), float, False),
        ),
        *(
            (10**400, float, False),
            (None, str | None, True),
            (7, str | None, False),
            ([1, "a"], list[int], False),
        ),
        *(
            ({"a": True}, dict[str, bool], True),
            ({"a": 1}, dict[str, bool], False),
            ("x", Any, True),
        ),
    ],
)
def test_types(value: object, kind: Any, good: bool) -> None:
    """Goal: true is not a number, a number is finite, lists and objects are looked into. Red with isinstance alone."""
    if good:
        assert checked({"a": value}, {"a": kind}) == {"a": value}
    else:
        with pytest.raises(MalformedError, match=r"^x\.a is "):
            checked({"a": value}, {"a": kind}, where="x")


# --- without an end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 100])
def test_lines_however_they_come(size: int) -> None:
    """Goal: each line comes whole with its end; what has none yet waits. Red with pieces handed on."""
    data = b"one\n\ntwo and more\nrest"
    splitter = LineSplitter(limit=12)
    lines = [
        line for at in range(0, len(data), size) for line in splitter.feed(data[at : at + size])
    ]
    assert lines == [b"one\n", b"\n", b"two and more\n"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_line_without_an_end_is_bounded(size: int) -> None:
    """Goal: more than the limit without a line's end is an error that shows its beginning. Red with the buffer grown
    without limit."""
    splitter, data = LineSplitter(limit=50), b"short\n" + b"x" * 51
    with pytest.raises(EndlessLineError) as caught:
        [splitter.feed(data[at : at + size]) for at in range(0, len(data), size)]
    assert caught.value.begin.startswith(b"xxx") and caught.value.limit == 50


def test_an_exit_code_without_an_end() -> None:
    """Goal: what follows the end mark is bounded too. Red with all of it held back."""
    frame = new_frame()
    reader = FrameReader(frame)
    reader.feed(frame.begin + frame.end)
    for _ in range(1000):
        reader.feed(b"7" * 1000)
    assert reader.code == 255 and len(reader._held) < 2000


ENDLESS = "import sys\nwhile True: sys.stdout.write('x' * 65536)"


def test_a_command_whose_line_has_no_end(
    make_host: Callable[..., Host], laptop: Laptop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a host that writes without a line's end, or without any end, is given up with its name, and not tried
    again; this machine as the host too, and its rsync. Red with a bound of 128 MiB in place of the test's: both the
    commands and rsync then wrote on to their time limit."""
    monkeypatch.setattr(framing, "LINE_BYTES_MAX", 1 << 20)
    monkeypatch.setattr(framing, "OUTPUT_BYTES_MAX", 1 << 20)
    with transport_to(make_host(), laptop, monkeypatch) as ssh:
        for transport in (LocalTransport(), ssh):
            stream = transport.stream([sys.executable, "-c", ENDLESS], first_line=b"")
            with pytest.raises(DeployError, match="has no end") as caught:
                list(stream.lines(idle_timeout_s=30))
            stream.close()
            assert transport.target in caught.value.text() and "begins: xxx" in caught.value.text()
            assert not isinstance(caught.value, TransportError), "which would be tried again"
            with pytest.raises(DeployError, match="has no end"):
                transport.run([sys.executable, "-c", ENDLESS], timeout_s=60)
    rsync = tmp_path / "rsync"
    rsync.write_text(f'#!/bin/sh\n[ "$1" = --version ] || exec {sys.executable} -c "{ENDLESS}"\n')
    rsync.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(DeployError, match="has no end"):
        run_rsync(LocalTransport(), [], timeout_s=60)


@pytest.mark.parametrize(
    "message",
    [
        *(
            {"file": "metrics.jsonl", "offset": offset, "data": "e30="}
            for offset in (True, "0", None, 0.0, [0], 1e400, -1)
        ),
        *(
            {"file": "metrics.jsonl", "offset": 0, "data": data}
            for data in (None, 7, ["e30="], "e30", "é")
        ),
        *({"file": "status.json", "snapshot": text} for text in (None, 7, {"a": 1})),
        {"file": "metrics.jsonl"},
    ],
)
def test_a_followed_file_s_message_with_another_field(
    message: dict[str, Any], tmp_path: Path
) -> None:
    """Goal: a piece of a file with an odd offset or text is a damaged message, and nothing is written. Red with int()
    and str() of what came: "None" in status.json."""
    mirror = Mirror(RunDir(tmp_path / "m"))
    with pytest.raises(TransportError, match="a damaged message"):
        mirror.apply(message)
    assert (
        sorted(path.name for path in (tmp_path / "m").iterdir() if path.name != ".gitignore") == []
    )


@pytest.mark.parametrize("code", [True, "0", -1, 256, 1.0, None, [0]])
def test_a_last_message_with_another_exit_code(code: Any) -> None:
    """Goal: an exit code is a number from 0 to 255 or not known; true is none. Red with isinstance(code, int)."""
    message = read_message(
        json.dumps({"ended": True, "state": ["done"], "exit_code": code}).encode()
    )
    assert message == {"ended": True, "state": "died", "exit_code": None}
