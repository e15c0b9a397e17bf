"""A command's own output between its marks, however the bytes come, and under every shell."""

import os
import subprocess

import pytest

from rollouts.remote.host.framing import FrameReader, framed_line, new_frame

OWN = b"first\nsecond without an end"


def read(chunks: list[bytes], reader: FrameReader) -> bytes:
    return b"".join(map(reader.feed, chunks)) + reader.rest()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "noise", [b"", b"Welcome\n", b"\x1b]0;title\x07", b"rollouts-begin-\nrollouts-end- 0\n\xff\x00"]
)
def test_what_lies_between_the_marks(noise: bytes, size: int) -> None:
    """Goal: exactly the command's bytes come out, whatever is around them and wherever the pieces are cut.

    Red with a mark sought in each piece alone (size 1 to 7), and with a line's end expected before the first mark.
    """
    frame = new_frame()
    stream = noise + frame.begin + OWN + frame.end + b"17\n" + noise + b"bye\n"
    reader = FrameReader(frame)
    assert read([stream[at : at + size] for at in range(0, len(stream), size)], reader) == OWN
    assert (reader.noise, reader.code, reader.ended) == (noise, 17, True)


def test_a_command_that_never_began() -> None:
    """Goal: all that came is noise, and nothing is taken for an answer. Red with the unframed output passed on."""
    reader = FrameReader(new_frame())
    assert read([b"This account is not available.\n"], reader) == b""
    assert (
        reader.noise == b"This account is not available.\n"
        and not reader.began
        and reader.code is None
    )


@pytest.mark.parametrize("code", [b"", b"x", b"-1", b"9" * 5000])
def test_an_exit_code_that_is_none(code: bytes) -> None:
    """Goal: a host that writes the mark with something else behind it has failed. Red with ValueError."""
    frame = new_frame()
    reader = FrameReader(frame)
    assert (
        read([frame.begin + OWN + frame.end + code + b"\n"], reader) == OWN and reader.code == 255
    )


def test_a_stream_that_breaks_off() -> None:
    """Goal: what came before the break is kept, without an exit code. Red with the held-back bytes lost."""
    frame = new_frame()
    reader = FrameReader(frame)
    assert (
        read([frame.begin + b"row\nrollouts-e"], reader) == b"row\nrollouts-e"
        and reader.code is None
    )


@pytest.mark.parametrize("shell", ["bash", "dash", "fish", "tcsh"])
def test_every_login_shell_passes_words_on(shell: str) -> None:
    """Goal: words, directory, exit code and input arrive under every login shell. Red with the words quoted for the
    login shell itself: csh ends a quoted string at a line's end and expands `!`, fish reads backslashes."""
    words = [
        "a b",
        "$HOME",
        "'",
        '"',
        "*",
        "\\",
        "\\\\'",
        "a\nb",
        "ü",
        "",
        "-x",
        "!x",
        "`id`",
        "%s",
        "~",
        "{a,b}",
    ]
    frame = new_frame()
    script = 'printf "%s\\0" "$PWD" "$@"; cat; exit 3'
    line = framed_line(["sh", "-c", script, "sh", *words], "/usr", frame)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([shell, "-c", "sh -s"], bufsize=0, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(line)
        process.stdin.flush()
        # from here on the input is the command's: dash reads ahead before
        begin = process.stdout.readline()
        rest, _ = process.communicate(b"input\x00!")
    reader = FrameReader(frame)
    assert read([begin, rest], reader).decode().split("\0") == ["/usr", *words, "input", "!"]
    assert reader.code == process.returncode == 3


def test_a_directory_that_is_not_there() -> None:
    """Goal: the command does not run elsewhere, and its input is not taken for commands. Red with `;` in place of &&,
    and with a shell that reads on after the line."""
    frame = new_frame()
    line = framed_line(["echo", "ran"], "/no/such", frame)
    done = subprocess.run(
        ["sh", "-s"], input=line + b"echo injected\n", capture_output=True, check=False
    )
    reader = FrameReader(frame)
    assert read([done.stdout], reader) == b"" and b"injected" not in done.stdout
    assert reader.code not in (0, None) and b"/no/such" in done.stderr


def test_messages_are_english_and_text_stays_the_hosts() -> None:
    """Goal: errors come in the words that are read here, whatever language the host has; its character set stays.

    Red with the host's variables as they are: "Kein Speicherplatz" was not a full disk.
    """
    frame = new_frame()
    show = 'echo "${LC_ALL-unset} $LC_MESSAGES $LANGUAGE. $LC_CTYPE $LANG"'
    environment = {
        **os.environ,
        "LC_ALL": "de_DE.UTF-8",
        "LANGUAGE": "de",
        "LC_CTYPE": "C",
        "LANG": "C",
    }
    line = framed_line(["sh", "-c", show], None, frame)
    done = subprocess.run(
        ["sh", "-s"], input=line, capture_output=True, check=True, env=environment
    )
    assert read([done.stdout], FrameReader(frame)) == b"unset C . de_DE.UTF-8 de_DE.UTF-8\n"
