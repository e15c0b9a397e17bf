"""The host's environment does not act on a run's: what would redirect Python, pip or uv is left out, and said."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments import isolation
from rollouts.worker.environments.installer import BootstrapError
from rollouts.worker.environments.virtual_environment import ensure_environment, is_complete
from tests.worker.environments import actions, deadline, version_in, write_wheel
from tests.worker.stands import (
    Host,
    alive,
    as_status,
    events,
    log,
    parent_of,
    process,
    recorded_pid,
    stage,
    trainer,
    wait_for,
    wait_for_end,
)

SHOW = "import os, tiny_thing; print(tiny_thing.version, os.environ.get('PYTHONPATH'), os.environ.get('PIP_INDEX_URL'))"


def notes(run: RunDir) -> str:
    return "\n".join(row["message"] for row in events(run, "note"))


REDIRECTING = {
    "PIP_TARGET": "{elsewhere}",
    "PIP_PREFIX": "{elsewhere}",
    "PIP_ROOT": "{elsewhere}",
    "PIP_USER": "1",
    "PIP_DRY_RUN": "1",
    "PIP_PYTHON": sys.executable,  # another interpreter's environment
    "PIP_PLATFORM": "win32",
    "PIP_REQUIRE_HASHES": "1",
    "PIP_CONSTRAINT": "{constraint}",
    "PYTHONPATH": "{elsewhere}",
    "PYTHONHOME": "/nowhere",
    "PYTHONSAFEPATH": "1",
    "PYTHONOPTIMIZE": "2",  # asserts would be gone
}


def test_variables_of_the_host(host: Host, spec: EnvironmentSpec, tmp_path: Path) -> None:
    """Goal: whatever the launcher's environment has set, the environment holds what was required, the trainer imports
    that, and a note names each variable. Red with all that the launcher had handed on; and with PYTHONPATH,
    PIP_DRY_RUN, PIP_CONSTRAINT or PIP_TARGET alone let through: no tiny-thing, or the other one."""
    elsewhere, constraint = tmp_path / "elsewhere", tmp_path / "constraint.txt"
    elsewhere.mkdir()
    (elsewhere / "tiny_thing.py").write_text("version = 'of another place'\n")
    constraint.write_text("tiny-thing==2.0\n")
    job = host.job(
        stage("sft", process("trainer", [f"{spec.path}/bin/python", "-c", SHOW])),
        environments=[spec],
    )
    given = {
        name: value.format(elsewhere=elsewhere, constraint=constraint)
        for name, value in REDIRECTING.items()
    }
    done = subprocess.run(
        [sys.executable, "-E", "-m", "rollouts.worker.launch"],
        input=json.dumps(job), capture_output=True, text=True, cwd=host.launched[-1].code_tree, check=False,
        env={**os.environ, **given, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = host.launched[-1]
    wait_for_end(run)
    assert log(run, "trainer") == "1.0 None http://127.0.0.1:9/simple\n", log(run, "supervisor")
    assert as_status(run)["state"] == "done"
    assert [name for name in REDIRECTING if name not in notes(run)] == []


def test_what_the_config_names_passes(host: Host, spec: EnvironmentSpec, tmp_path: Path) -> None:
    """Goal: host.env may set such a variable, and then no note is written of it. Red with the names left out after
    host.env was put in."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text("print('mine')\n")
    declared = {"PYTHONPATH": str(tmp_path / "own")}
    job = host.job(stage("sft", trainer("import mine", env=declared)), host_env=declared)
    done = host.launch(
        job, env={**os.environ, "PYTHONPATH": "/undeclared", "CONDA_PREFIX": "/opt/conda"}
    )
    assert done.returncode == 0, done.stderr
    run = host.launched[-1]
    wait_for_end(run)
    assert log(run, "trainer") == "mine\n"
    assert "CONDA_PREFIX" in notes(run) and "PYTHONPATH" not in notes(run)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        *(
            (name, True)
            for name in (
                "PIP_INDEX_URL",
                "PIP_EXTRA_INDEX_URL",
                "PIP_FIND_LINKS",
                "PIP_CERT",
                "PIP_PROXY",
            )
        ),
        *(
            (name, True)
            for name in (
                "UV_INDEX_URL",
                "UV_DEFAULT_INDEX",
                "UV_INDEX_MINE_PASSWORD",
                "UV_CACHE_DIR",
            )
        ),
        *(
            (name, True)
            for name in (
                "PATH",
                "HOME",
                "LD_LIBRARY_PATH",
                "https_proxy",
                "SSL_CERT_FILE",
                "HF_HOME",
            )
        ),
        *(
            (name, True)
            for name in (
                "PYTHON_VERSION",
                "PYTHONUNBUFFERED",
                "PYTHONHASHSEED",
                "CUDA_HOME",
                "PIPELINE",
            )
        ),
        *(
            (name, False)
            for name in ("PYTHONUSERBASE", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONPLATLIBDIR")
        ),
        *(
            (name, False)
            for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "__PYVENV_LAUNCHER__")
        ),
        *(
            (name, False)
            for name in (
                "PIP_NO_DEPS",
                "PIP_REQUIREMENT",
                "PIP_PRE",
                "PIP_IGNORE_INSTALLED",
                "PIP_SRC",
            )
        ),
        *(
            (name, False)
            for name in ("UV_SYSTEM_PYTHON", "UV_PYTHON", "UV_PROJECT_ENVIRONMENT", "UV_CONSTRAINT")
        ),
        *((name, False) for name in ("PET_STANDALONE", "PET_MAX_RESTARTS", "PET_NNODES")),
        *(
            (name, False)
            for name in ("UV_OVERRIDE", "UV_EXCLUDE_NEWER", "UV_RESOLUTION", "UV_PRERELEASE")
        ),
    ],
)
def test_which_names_pass(name: str, passes: bool) -> None:
    """Goal: indexes, certificates, proxies and caches pass; what says which code runs, or what goes where, does not.
    Red with any of the lists empty."""
    assert isolation.redirects(name) != passes


@pytest.mark.parametrize(
    "text",
    [
        "[install]\ntarget = {elsewhere}\n",
        "[global]\nprefix = {elsewhere}\n",
        "[install]\nuser = true\n",
        "[global]\ndry-run = yes\n",
        "[install]\nno-deps = true\nroot = {elsewhere}\n",
        "[global]\nconstraint = {elsewhere}/other.txt\n",
    ],
)
def test_a_setting_of_pips_configuration(
    spec: EnvironmentSpec, run: RunDir, wheels: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Goal: of the account's pip.conf the places to find packages count, and where to put them does not; that it was
    left out is told. Red with pip left to read the file: the environment lacks tiny-thing, or has 2.0."""
    home = Path(spec.path).parents[1] / "home"
    (home / ".config" / "pip").mkdir(parents=True)
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.txt").write_text("tiny-thing==2.0\n")
    found = f"[global]\nno-index = true\nfind-links =\n    {wheels}\n    /nowhere\n"
    settings = text.format(elsewhere=elsewhere)
    if settings.startswith("[global]"):
        found, settings = found + settings.removeprefix("[global]\n"), ""
    (home / ".config" / "pip" / "pip.conf").write_text(found + settings)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    ensure_environment(replace(spec, requirements=["tiny-thing"]), run, deadline())
    assert version_in(spec) == "1.0" and sorted(path.name for path in elsewhere.iterdir()) == [
        "other.txt"
    ]
    assert (
        text.splitlines()[1].split(" ")[0]
        in events(run, "environment")[-1]["pip_settings_left_out"]
    )


def test_an_installer_that_put_it_elsewhere(
    spec: EnvironmentSpec, run: RunDir, tmp_path: Path
) -> None:
    """Goal: exit code 0 is not enough: what the new interpreter lacks is named, and nothing counts as built. Red with
    the marker written on the exit code alone: "reused" ever after."""
    lying = tmp_path / "uv-home" / ".local" / "bin" / "uv"
    lying.parent.mkdir(parents=True)
    lying.write_text(
        f'#!/bin/sh\nif [ "$1" = venv ]; then exec cp -a {tmp_path}/pristine "$4"; fi\necho Installed 1 package\n'
    )
    lying.chmod(0o755)
    subprocess.run([spec.base_python, "-m", "venv", str(tmp_path / "pristine")], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{lying.parent}:/usr/bin:/bin")
        with pytest.raises(
            BootstrapError, match=r"tiny-thing is not installed .*sent the packages elsewhere"
        ):
            ensure_environment(replace(spec, installer="uv"), run, deadline())
    assert not is_complete(Path(spec.path)) and not run.environment("trainer").exists()


def test_a_complete_one_that_was_changed(spec: EnvironmentSpec, run: RunDir) -> None:
    """Goal: a reused environment that no longer holds what it is named for is refused, with what to do. Red with the
    marker alone looked at."""
    ensure_environment(spec, run, deadline())
    for requirement in (
        "tiny-thing>=1.5",
        "tiny-thing[extra]==2.*",
        "tiny_thing>1; python_version>'3'",
    ):
        changed = replace(spec, requirements=[requirement], constraints="")
        refused = r"tiny-thing is 1\.0, needs .*; remove .* while no run uses it"
        with pytest.raises(BootstrapError, match=refused) as caught:
            ensure_environment(changed, run, deadline())
        assert len(caught.value.log_tail) == 1 and is_complete(Path(spec.path))


def test_what_was_installed_is_recorded(
    spec: EnvironmentSpec, run: RunDir, wheels: Path, tmp_path: Path
) -> None:
    """Goal: code/environment-<name>.txt has each package at its version, as the environment's own interpreter sees it;
    also of one that is reused. Red with the record left out on reuse."""
    ensure_environment(spec, run, deadline())
    other = RunDir(tmp_path / "runs" / "r2")
    ensure_environment(replace(spec, name="engine"), other, deadline())
    assert actions(other) == ["reused"]
    listed = run.environment("trainer").read_text()
    assert listed == other.environment("engine").read_text()
    frozen = subprocess.run(
        [f"{spec.path}/bin/python", "-m", "pip", "freeze", "--all"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert sorted(listed.splitlines()) == sorted(
        line.replace("tiny_thing", "tiny-thing") for line in frozen.splitlines()
    )
    assert "tiny-thing==1.0\n" in listed


def test_what_lies_on_the_path_is_not_taken_for_installed(
    spec: EnvironmentSpec,
    run: RunDir,
    tmp_path: Path,
    wheels: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: a package in this process's PYTHONPATH is none of the environment's. Red with the interpreter asked without
    -I."""
    (tmp_path / "site").mkdir()
    write_wheel(tmp_path, "stray", "1.0")
    shutil.unpack_archive(tmp_path / "stray-1.0-py3-none-any.whl", tmp_path / "site", "zip")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    ensure_environment(spec, run, deadline())
    assert "stray" not in run.environment("trainer").read_text()


def test_kill_9_of_supervisor_and_wrapper_while_it_builds(
    host: Host, spec: EnvironmentSpec, tmp_path: Path
) -> None:
    """Goal: an installer ends with its supervisor even when nobody is left to end it. Red without the kernel's
    parent-death signal: it goes on into a directory that the next run builds in."""
    slow = tmp_path / "slow-python"
    slow.write_text('#!/bin/sh\nmkdir -p "$3"\necho $$ > "$3/installer"\nexec sleep 600\n')
    slow.chmod(0o755)
    run = host.start(
        stage("sft", trainer("pass")), environments=[replace(spec, base_python=str(slow))]
    )
    noted = Path(spec.path) / "installer"
    wait_for(lambda: noted.exists() and noted.read_text(), "the installer")
    supervisor, installer = recorded_pid(run, "supervisor"), int(noted.read_text())
    for pid in (parent_of(supervisor), supervisor):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(installer), "the installer's end")
    assert run_dir.observe(run).state == "died"


def test_an_installer_holds_the_lock_itself(
    spec: EnvironmentSpec, run: RunDir, tmp_path: Path
) -> None:
    """Goal: while a process of the installer lives, nobody else builds in its place, whoever else has ended. Red with
    the lock's descriptor closed in the child."""
    lingering = tmp_path / "lingering-python"
    left_behind = f"echo $$ > {tmp_path}/left; exec sleep 600"
    # it ends once the other is in a session of its own
    lingering.write_text(
        f"#!/bin/sh\nsetsid sh -c '{left_behind}' &\nwhile [ ! -s {tmp_path}/left ]; do sleep 0.02; done\nexit 3\n"
    )
    lingering.chmod(0o755)
    with pytest.raises(BootstrapError, match="failed with exit code 3"):
        ensure_environment(replace(spec, base_python=str(lingering)), run, deadline())
    left = int((tmp_path / "left").read_text())
    try:
        with pytest.raises(BootstrapError, match="another run was still building it"):
            ensure_environment(spec, run, deadline(0.5))
    finally:
        os.kill(left, signal.SIGKILL)
    ensure_environment(spec, run, deadline())
    assert version_in(spec) == "1.0"
