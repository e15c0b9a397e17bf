"""`deploy doctor`: what it measures on real hosts, with a stand-in nvidia-smi, hub and index; and each of its rules."""

import contextlib
import dataclasses
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rollouts.remote.doctor import doctor
from rollouts.remote.doctor_text import Findings, doctor_text
from rollouts.remote.host import host_health
from rollouts.remote.host.host_health import (
    CardHealth,
    Disk,
    HostHealth,
    ModelAccess,
    Question,
    Site,
    examine,
    read_links,
)
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.plan.health_problems import diagnose
from rollouts.worker.host_check.disks import disk_row, file_system
from rollouts.worker.host_check.network import network_row
from rollouts.worker.host_check.whole_machine import owners
from tests.ports import free_port
from tests.remote.hosts import Host, Laptop, tool_directory, write_config
from tests.remote.test_plan import FACTS

MakeHost = Callable[..., Host]
TOKEN = "secret-token"
WHOLE = "GPU-12000000-0000-4ccf-63cf-6435cf462af1"

# As the real one on two H200: it refuses a whole query over one field that it does not know, and underlines topo's
# header. Card 0 had errors and hangs on half of its lanes.
NVIDIA_SMI = """#!/bin/sh
refuse() { echo "Field \\"$1\\" is not a valid field to query."; exit 2; }
cells() {
  card=$1; shift; line=
  for field; do
    case $field.$card in
      index.*) cell=$card ;; gpu_uuid.*|uuid.*) cell=GPU-12000000-0000-4ccf-63cf-6435cf462af$card ;;
      name.*) cell='NVIDIA H200' ;; memory.total.*) cell=143771 ;; memory.free.*) cell=143156 ;;
      driver_version.*) cell=580.105.08 ;; compute_mode.*) cell=Default ;; mig.mode.current.*) cell=Disabled ;;
      compute_cap.*) cell=9.0 ;; pcie.link.gen.*) cell=5 ;; pcie.link.width.current.0) cell=8 ;;
      pcie.link.width.*) cell=16 ;; ecc.mode.current.*) cell=Enabled ;; ecc.errors.corrected.*) cell=3 ;;
      ecc.errors.uncorrected.*.0) cell=2 ;; ecc.errors.uncorrected.*) cell=0 ;; temperature.gpu.*) cell=41 ;;
      remapped_rows.pending.0) cell=1 ;; remapped_rows.*) cell=0 ;; *) refuse "$field" ;;
    esac
    line="$line${line:+, }$cell"
  done
  echo "$line"
}
case $1 in
  topo)
    printf '\\t\\033[4mGPU0\\tGPU1\\tNIC0\\tCPU Affinity\\tNUMA Affinity\\tGPU NUMA ID\\033[0m\\n'
    printf 'GPU0\\t X \\tNV18\\tSYS\\t0-95\\t0\\t\\tN/A\\nGPU1\\tNV18\\t X \\tPIX\\t0-95\\t0\\t\\tN/A\\n'
    printf 'NIC0\\tSYS\\tPIX\\t X \\n\\nLegend:\\n\\n  X    = Self\\n' ;;
  --query-gpu=*|--query-remapped-rows=*)
    fields=$(echo "${1#*=}" | tr , ' '); cells 0 $fields && cells 1 $fields ;;
  --query-compute-apps=*) cat "$0.apps" ;;
esac
"""


def cards(directory: Path, pid: int) -> Path:
    """Return a PATH with that nvidia-smi, on which `pid` holds the second card."""
    tools = tool_directory(directory)
    for name, text in (
        ("nvidia-smi", NVIDIA_SMI),
        ("nvidia-smi.apps", f"{WHOLE}, {pid}, 615, python3\n"),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return tools


class Sites(http.server.BaseHTTPRequestHandler):
    """A package index and a model hub: `org/gated` wants a token. Keeps what each request carried."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        self.seen.append((self.path, token))
        code, error = 200, ""
        if self.path.startswith("/org/gated/") and token != f"Bearer {TOKEN}":
            code, error = 401, "GatedRepo"
        elif self.path.startswith("/org/none/"):
            code, error = 404, "RepoNotFound"
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        return


@contextlib.contextmanager
def sites() -> Iterator[str]:
    Sites.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sites) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This machine as the host, with an index and a hub that it reaches; their URL."""
    with sites() as url:
        monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HOME", str(tmp_path))
        for name, value in (
            ("PIP_INDEX_URL", f"{url}/simple"),
            ("PIP_CONFIG_FILE", os.devnull),
            ("HF_ENDPOINT", url),
        ):
            monkeypatch.setenv(name, value)
        for name in (
            "UV_DEFAULT_INDEX",
            "UV_INDEX_URL",
            "PIP_EXTRA_INDEX_URL",
            "UV_EXTRA_INDEX_URL",
            "HF_TOKEN",
        ):
            monkeypatch.delenv(name, raising=False)
        yield url


def ask(config: str | None = None, remote: str | None = None) -> Any:
    return doctor(config, remote=remote, accept_new_host_key=False, settings=())


def too_long(text: str) -> list[str]:
    """Return lines of more than 80 columns, but for those with a path that is not cut."""
    return [
        line for line in text.splitlines() if len(line) > 80 and max(map(len, line.split())) < 40
    ]


def test_this_machine(here: str, tmp_path: Path) -> None:
    """Goal: without a GPU and a host the answers are true, in 80 columns, and nothing is left."""
    answer = ask()
    health = answer.document["health"]
    assert answer.exit_code == 0 and answer.document["ready"] and answer.document["stops"] == []
    assert (
        health["cores"] == os.cpu_count() and health["memory_mib"] > 100 and health["cards"] == ()
    )
    assert [(disk["name"], disk["problem"], disk["locks"]) for disk in health["disks"]][:2] == [
        ("home", "", True),
        ("tmp", "", True),
    ]
    assert {site["kind"]: site["problem"] for site in health["sites"]}["hub"] == ""
    least, most = health["clock_ahead_s"]
    assert least <= 0 <= most
    assert (
        f"index    {here}/simple answers in" in answer.text
        and "way      this machine" in answer.text
    )
    assert too_long(answer.text) == []
    assert answer.text.endswith("Nothing stops a run.")
    assert json.dumps(answer.document) and [*tmp_path.iterdir()] == []


def test_cards_over_ssh(make_host: MakeHost, laptop: Laptop, tmp_path: Path) -> None:
    """Goal: over a real sshd, links, lanes, memory errors and holders with their owner are told, each fault with its
    fix, and a field that this nvidia-smi lacks costs itself alone."""
    with sites() as url:
        host = make_host(
            path=cards(tmp_path / "tools", os.getpid()),
            environment={
                "PIP_INDEX_URL": f"{url}/simple",
                "HF_ENDPOINT": url,
                "PIP_CONFIG_FILE": os.devnull,
            },
        )
        done = laptop.deploy("doctor", "--remote", host.target, env={"COLUMNS": "80"})
        found = laptop.json("doctor", "--remote", host.target)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "18 NVLinks between 0-1",
        "PCIe of generation 5, 8 of 16 lanes; ECC on, 2 errors not corrected, 3 corrected; 41 °C",
        f"GPU 1: pid {os.getpid()} python3, 615 MiB, of",
        "GPU 0 (NVIDIA H200) had memory errors that could not be corrected.",
        "GPU 0 (NVIDIA H200) has bad memory.",
        "GPU 0 (NVIDIA H200) has 8 of 16 PCIe lanes.",
        "nvidia-smi -i 0 -r",
    ):
        assert words in " ".join(done.stdout.split()), words
    assert "GPU 1 (NVIDIA H200) ha" not in done.stdout
    assert too_long(done.stdout) == []
    assert found["health"]["links"] == {"0-1": "NV18"} and "paramiko" in found["way"]
    (owner,) = found["health"]["owners"]
    assert owner["pid"] == os.getpid() and owner["started_at"] > 1e9


def test_a_host_that_cannot_be_reached(laptop: Laptop) -> None:
    """Goal: no connection is a finding like any other: exit code 1, with its fix."""
    done = laptop.deploy("doctor", "--remote", f"127.0.0.1:{free_port()}")
    assert (
        done.returncode == 1
        and "refused the connection" in done.stdout
        and "check the port" in done.stdout
    )
    assert "1 problem stops a run." in done.stdout


@pytest.mark.parametrize(
    ("model", "token", "state"),
    [
        ("org/open", "", "open"),
        ("org/gated", "", "gated"),
        ("org/gated", TOKEN, "open"),
        ("org/none", "", "missing"),
    ],
)
def test_models_of_the_hub(here: str, model: str, token: str, state: str) -> None:
    """Goal: a model is asked for with the token, which no index and no other page sees."""
    environment = {"PIP_INDEX_URL": f"{here}/simple", "HF_ENDPOINT": here, "HF_TOKEN": token}
    (found,) = network_row(environment, [model])["models"]
    assert (found["state"], found["token"]) == (state, bool(token))
    sent = f"Bearer {token}" if token else None
    assert {(path.startswith(f"/{model}/"), bearer) for path, bearer in Sites.seen} == {
        (True, sent),
        (False, None),
    }


def test_a_gated_model_of_a_config(
    here: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a config's model is asked for with the secret that its run would have, which no output shows; without the
    secret it stops the run."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    options: dict[str, Any] = {"model__name": "org/gated", "host__env": {}}
    answer = ask(str(write_config(project, **options, host__secrets=["HF_TOKEN"])))
    assert answer.exit_code == 0 and "model    org/gated: open, with a token" in answer.text, (
        answer.text
    )
    assert TOKEN not in answer.text + json.dumps(answer.document)
    monkeypatch.delenv("HF_TOKEN")
    answer = ask(str(write_config(project, **options)))
    assert answer.exit_code == 1 and "error: the model org/gated is gated" in answer.text
    assert "export HF_TOKEN here" in answer.text


def test_a_config_that_does_not_fit(
    here: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: with a config every reason of its plan counts."""
    monkeypatch.chdir(project)
    answer = ask(str(write_config(project, target__device_type="cuda")))
    assert answer.exit_code == 1 and "local has 0 GPUs; this config needs 1." in answer.text


def test_a_directory_that_cannot_be_written() -> None:
    """Goal: the reason is kept, and nothing is measured."""
    row = disk_row("home", Path("/proc"))
    assert (
        row["problem"]
        and row["write_mib_s"] is None
        and row["file_system"] == file_system(Path("/proc/1")) == "proc"
    )


def test_owners_of_processes() -> None:
    """Goal: a process that has gone, or that a container hides, costs its own row alone. Red without the guard."""
    (own,) = owners([2**22 + 1, os.getpid()])
    assert own["pid"] == os.getpid() and own["user"]


def test_an_index_that_does_not_answer(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: an index that is not there stops a run that has no environment yet, and is shown without its password."""
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:password@127.0.0.1:{free_port()}/simple")
    answer = ask()
    assert answer.exit_code == 1 and "local does not reach the package index" in answer.text
    assert (
        "PIP_INDEX_URL in host.env" in answer.text
        and "password" not in answer.text + json.dumps(answer.document)
    )


@pytest.mark.parametrize(
    ("shift_s", "told"), [(-7200.0, "ahead of"), (7200.0, "behind"), (0.0, "")]
)
def test_clocks(here: str, monkeypatch: pytest.MonkeyPatch, shift_s: float, told: str) -> None:
    """Goal: clocks that differ by hours are told apart, whichever is ahead; the way there and back counts as
    neither."""
    real = host_health.time.time
    monkeypatch.setattr(host_health.time, "time", lambda: real() + shift_s)
    assert FACTS.python
    found = examine(LocalTransport(), "python3", Question(home="/tmp"))
    monkeypatch.undo()
    said = [problem.message for problem in diagnose(FACTS, found, "gpu-7", reuses=True).warnings]
    assert [message for message in said if "clock" in message] == [
        message for message in said if f"{told} this machine's." in message and told
    ]
    assert bool(told) == any("its clock is 7" in message for message in said), said


TOPOLOGY = """\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNV4\tSYS\tSYS\t0-31\t0\t\tN/A
GPU1\tNV4\t X \tSYS\tSYS\t0-31\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tPHB\t32-63\t1\t\tN/A
GPU3\tSYS\tSYS\tPHB\t X \t32-63\t1\t\tN/A

Legend:

  X    = Self
"""


def test_topologies() -> None:
    """Goal: each pair once, and one card, or none, is no pair. Red with each pair told both ways."""
    pairs = {"0-1": "NV4", "0-2": "SYS", "0-3": "SYS", "1-2": "SYS", "1-3": "SYS", "2-3": "PHB"}
    assert read_links(TOPOLOGY) == pairs
    assert (
        read_links("\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-7\t\tN/A\n")
        == {}
        == read_links("")
    )


HOME = Disk(
    name="home",
    path="/home/u",
    file_system="ext4",
    total_mib=1 << 20,
    free_mib=1 << 19,
    free_files=None,
    runs_programs=True,
    locks=True,
    write_mib_s=900.0,
    problem="",
)
CARD = CardHealth(
    index=0,
    pcie_width=16,
    pcie_width_max=16,
    pcie_gen_max=5,
    ecc="Enabled",
    ecc_uncorrected=0,
    ecc_corrected=0,
    temperature_c=40,
    slowed_down=False,
    remap_pending=False,
    remap_failed=False,
)
WELL = HostHealth(
    cores=8,
    cores_allowed=8.0,
    memory_mib=64 << 10,
    memory_free_mib=60 << 10,
    memory_limit_mib=None,
    open_files=(1024, 524288),
    processes=(None, None),
    locked_kib=(8192, 8192),
    file_mib=(None, None),
    disks=(
        HOME,
        dataclasses.replace(HOME, name="tmp", path="/tmp"),
        dataclasses.replace(HOME, name="shm"),
    ),
    cards=(CARD,),
    links={},
    owners=(),
    sites=(
        Site(kind="package index", url="u", seconds=0.1, problem=""),
        Site(kind="hub", url="h", seconds=0.1, problem=""),
    ),
    models=(),
    offline=False,
    clock_ahead_s=(-0.1, 0.1),
)


def disk(**changes: Any) -> dict[str, Any]:
    return {"disks": (dataclasses.replace(HOME, **changes),)}


def card(**changes: Any) -> dict[str, Any]:
    return {"cards": (dataclasses.replace(CARD, **changes),)}


def site(kind: str) -> dict[str, Any]:
    return {"sites": (Site(kind=kind, url="u", seconds=None, problem="Connection refused"),)}


RULES: list[tuple[dict[str, Any], bool, str, str]] = [
    (disk(problem="Permission denied"), True, "nothing can be written to /home/u", "ROLLOUTS_HOME"),
    (disk(problem="Read-only file system", name="tmp"), True, "nothing can be written", "TMPDIR"),
    (disk(problem="Permission denied", name="shm"), False, "nothing can be written", "--shm-size"),
    (disk(runs_programs=False), True, "no program can be run from /home/u", "another disk"),
    (disk(locks=False, file_system="nfs"), True, "cannot be locked", "local disk"),
    (disk(write_mib_s=9.0), False, "/home/u is slow", "faster disk"),
    (disk(free_mib=300), False, "almost full", "free some space"),
    (disk(free_files=0), True, "few more files", "environments"),
    (disk(free_files=99), False, "few more files", "quota"),
    ({"open_files": (256, 512)}, False, "512 open files", "nofile"),
    ({"processes": (100, None)}, False, "100 processes", "nproc"),
    ({"file_mib": (1000, None)}, False, "no file may be larger than 1000 MiB", "ulimit -f"),
    ({"memory_free_mib": 300}, False, "little memory is free", "end what uses it"),
    ({"clock_ahead_s": (100.0, 101.0)}, False, "its clock is 100 s ahead of", "timedatectl"),
    ({"clock_ahead_s": (-101.0, -100.0)}, False, "its clock is 100 s behind", "timedatectl"),
    (site("package index"), True, "does not reach the package index u", "PIP_INDEX_URL"),
    (site("hub"), False, "does not reach the hub u", "HF_ENDPOINT"),
    (
        {"models": (ModelAccess(name="m", state="gated", problem="HTTP 401", token=True),)},
        True,
        "m is gated",
        "licence",
    ),
    (
        {"models": (ModelAccess(name="m", state="missing", problem="HTTP 404", token=False),)},
        True,
        "lacks a",
        "HF_TOKEN",
    ),
    (
        {"models": (ModelAccess(name="m", state="unknown", problem="HTTP 500", token=False),)},
        False,
        "not known",
        "again",
    ),
    (card(ecc_uncorrected=1), False, "memory errors", "nvidia-smi -i 0 -r"),
    (card(remap_pending=True), False, "bad memory", "nvidia-smi -i 0 -r"),
    (card(remap_failed=True), False, "bad memory", "replaced"),
    (card(slowed_down=True), False, "slowed down", "cooling"),
    (card(pcie_width=4), False, "4 of 16 PCIe lanes", "seat the card"),
]


@pytest.mark.parametrize(
    ("changes", "stops", "message", "fix"), RULES, ids=lambda value: str(value)[:40]
)
def test_rules(changes: dict[str, Any], stops: bool, message: str, fix: str) -> None:
    """Goal: each fault is one problem with its fix, and stops a run or does not."""
    well = diagnose(FACTS, WELL, "gpu-7", reuses=False)
    assert well.stops == well.warnings == ()
    found = diagnose(FACTS, dataclasses.replace(WELL, **changes), "gpu-7", reuses=False)
    (problem,) = found.stops if stops else found.warnings
    assert found.stops == () or found.warnings == ()
    assert message in problem.message and fix in problem.fix
    text = doctor_text(Findings("gpu-7", None, None, "", found.stops, found.warnings), width=80)
    assert (
        text.startswith("gpu-7\n\n" + ("error: " if stops else "warning: "))
        and "  fix     " in text
    )


def test_an_index_is_not_asked_for_what_is_there() -> None:
    """Goal: a host that has its environments runs without an index. Red with `reuses` passed over."""
    changed = dataclasses.replace(WELL, **site("package index"))
    assert diagnose(FACTS, changed, "gpu-7", reuses=True).stops == ()
