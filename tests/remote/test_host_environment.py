"""A host whose environment would redirect Python and pip: a whole run over SSH, from what the config names alone."""

from collections.abc import Callable
from pathlib import Path

from rollouts.run_dir import RunDir, read_jsonl
from tests.remote.hosts import Host, Laptop, write_config


def test_a_run_on_a_host_with_its_own_environment(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Goal: variables that keep Python from finding the sent code, or send packages elsewhere, do not act on any step
    from the first look to the pull; a note says so; what was installed lies in the mirror. Red with the launcher run
    without -E ("No module named 'rollouts'"), with the probe run without -I, and with the record left out of both ways
    that files come here."""
    redirecting = {
        "PYTHONSAFEPATH": "1",
        "PYTHONHOME": "/nowhere",
        "PIP_TARGET": str(tmp_path / "elsewhere"),
    }
    remote = make_host(environment=redirecting)
    config = write_config(laptop.project)
    done = laptop.deploy(str(config), "--remote", remote.target, "--run-id", "odd")
    assert done.returncode == 0, done.stdout + done.stderr
    here, there = (
        RunDir(laptop.project / "runs" / "example" / "odd"),
        RunDir(remote.run_path("odd")),
    )
    (note,) = (
        row["message"]
        for row in read_jsonl(here.events)
        if row["kind"] == "note" and "left out" in row["message"]
    )
    assert all(name in note for name in redirecting) and "left out" in done.stdout
    recorded = here.environment("trainer").read_text()
    assert recorded == there.environment("trainer").read_text() and "pip==" in recorded
    here.environment("trainer").unlink()
    assert laptop.deploy("pull", "odd").returncode == 0
    assert here.environment("trainer").read_text() == recorded
