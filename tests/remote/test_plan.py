"""The plan as a pure value: every reason against a run, and the exact command lines of one that can start."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from base_config import Mlflow, TensorBoard, Wandb
from rollouts.machine.nvidia_smi import Gpu, GpuProcess
from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan import (
    Plan,
    environment_key,
    make_plan,
    read_lock,
    required_paths,
    required_ports,
)
from rollouts.remote.repository import Code
from rollouts.run_dir import LaunchPlan
from tests.example_config import example_config, kl, replace_at, sglang

H200 = Gpu(
    index=0, uuid="GPU-a", name="NVIDIA H200", memory_total_mib=143771, memory_free_mib=143000
)
FACTS = HostFacts(
    home="/home/u/.rollouts",
    user="u",
    host="gpu-7",
    system="Linux 6.1",
    path="/usr/bin:/bin",
    tools={"tmux": "/usr/bin/tmux", "rsync": "/usr/bin/rsync", "uv": "/usr/bin/uv"},
    versions={},
    driver="570.1",
    gpus=(H200,),
    gpu_problem="",
    gpu_processes=(),
    pythons_seen=("python3 3.11.2",),
    python="/usr/bin/python3",
    python_version="3.11.2",
    platform="linux-x86_64",
    has_venv=True,
    disk_free_bytes=500 * 2**30,
)
CODE = Code(
    root=Path("/repo"),
    project="repo",
    files=("a.py", "configs/models/tiny_qwen2/config.json"),
    changed=1,
    size_bytes=1000,
    commit="0123456789abcdef",
    dirty_diff="",
    requirements=("torch>=2.9",),
    constraints="torch==2.13\n",
    engine_requirements="",
    named={
        "configs/models/tiny_qwen2": "sent",
        "configs/data/letters/train_sft.jsonl": "sent",
        "configs/data/letters/train_rl.jsonl": "sent",
        "configs/data/letters/test.jsonl": "sent",
    },
)
RUN_ROW = {
    "run_id": "old",
    "experiment_name": "example",
    "state": "running",
    "stage": "rl",
    "step": 7,
    "live": True,
    "host": None,
}


def plan_for(
    *,
    facts: dict[str, Any] | None = None,
    code: dict[str, Any] | None = None,
    run_id: str = "r1",
    **changes: Any,
) -> Plan:
    """A plan of the example config; `changes` are its fields, with __ for the dots. A whole engine comes first."""
    config = example_config()
    for path, value in sorted(changes.items(), key=lambda change: change[0] != "engine"):
        config = replace_at(config, path.replace("__", "."), value)
    return make_plan(
        config,
        dataclasses.replace(FACTS, **(facts or {})),
        dataclasses.replace(CODE, **(code or {})),
        target="gpu-7",
        run_id=run_id,
        local_dir="/repo/runs/example/r1",
        secrets_set=["SET"],
    )


CUDA = {"target__device_type": "cuda"}
BUSY = dataclasses.replace(H200, memory_free_mib=20_000)
SECOND = dataclasses.replace(H200, index=1, uuid="GPU-b")
HOLDER = GpuProcess(gpu_uuid="GPU-a", pid=4711, memory_mib=1000, name="python")
LOCK = "# a comment\nfastapi==1.0\n\nsglang==0.5.21  # no-deps: its CUDA kernels\ntorch==2.13.0 # of the CPU\n"
HALF = {"model__dtype": "bfloat16"}
SGLANG: dict[str, Any] = {
    "engine": sglang(requirements_file="requirements/sglang-cuda.txt", max_total_tokens=None),
    "code": {"engine_requirements": LOCK},
}
PROBLEMS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "run id in use",
        {"facts": {"run_exists": True}},
        ["run id 'r1' is in use", "deploy attach r1"],
    ),
    ("bad run id", {"run_id": "a.b"}, ["--run-id 'a.b'", "1 to 80 letters"]),
    (
        "no free port",
        {"engine__sglang_port": 0},
        [
            "gpu-7: no 1 free ports in a row were found",
            "set engine.sglang_port to a port that is free there",
        ],
    ),
    (
        "no tmux",
        {"facts": {"tools": {"rsync": "r"}}},
        ["gpu-7 has no tmux.", "apt-get install tmux"],
    ),
    (
        "no rsync",
        {"facts": {"tools": {"tmux": "t"}}},
        ["gpu-7 has no rsync.", "apt-get install rsync"],
    ),
    (
        "no python",
        {"facts": {"python": None}},
        ["no Python 3.10 or newer", "python3 3.11.2", "python3.11-venv"],
    ),
    (
        "one GPU too few",
        {**CUDA, "engine__gpu_ranks": [1]},
        [
            "gpu-7 has 1 GPU; this config needs 2",
            "0: NVIDIA H200, 140 of 140 GiB free",
            "target.gpu_ranks=[0], engine.gpu_ranks=[1]",
            "set engine.gpu_ranks=[0] and target.gpu_ranks=[0] (colocated), or choose another --remote",
        ],
    ),
    (
        "no GPU",
        {**CUDA, "facts": {"gpus": ()}},
        ["gpu-7 has 0 GPUs; this config needs 1", "no nvidia-smi"],
    ),
    (
        "driver broken",
        {
            **CUDA,
            "facts": {
                "gpus": (),
                "gpu_problem": "Failed to initialize NVML: Driver/library version mismatch",
            },
        },
        ["Failed to initialize NVML"],
    ),
    (
        "GPU held",
        {**CUDA, "facts": {"gpu_processes": (HOLDER,), "gpus": (H200, SECOND)}},
        ["GPU 0 is busy", "pid 4711 python, 1000 MiB", "free are [1]"],
    ),
    (
        "GPU full",
        {**CUDA, "facts": {"gpus": (BUSY,)}},
        ["GPU 0 is busy", "20 of 140 GiB free", "end what runs there"],
    ),
    (
        "disk",
        {"facts": {"disk_free_bytes": 2**29}},
        ["gpu-7 has 0.5 GiB of disk left", "host.disk_free_gib_min=1.0", "ROLLOUTS_HOME"],
    ),
    (
        "port",
        {"facts": {"ports_in_use": (30180,)}},
        ["port 30180 is in use", "another engine.sglang_port"],
    ),
    (
        "a replica's port",
        {"facts": {"ports_in_use": (30181,)}, "engine__replicas": 2, "engine__gpu_ranks": [0, 1]},
        ["port 30181 is in use", "engine.sglang_port=30180, the first of engine.replicas=2"],
    ),
    (
        "another engine's lock",
        {**SGLANG, "code": {"engine_requirements": "torch==2.13.0\nvllm==0.32.0\n"}},
        [
            "engine.requirements_file='requirements/sglang-cuda.txt' does not install sglang",
            "2 requirements",
            "engine=SGLang",
        ],
    ),
    (
        "an empty lock",
        {
            "engine__requirements_file": "requirements/mine.txt",
            "code": {"engine_requirements": "# none yet\n"},
        },
        ["engine.requirements_file='requirements/mine.txt' lists no package", "None"],
    ),
    (
        "router's port",
        {**SGLANG, "engine__router_port": 31000, "facts": {"ports_in_use": (31000,)}},
        [
            "port 31000 is in use",
            "engine.router_port=31000, for the router",
            "another engine.router_port",
        ],
    ),
    (
        "constraints",
        {"code": {"constraints": None}},
        ["requirements/constraints.txt", "is not in /repo"],
    ),
    (
        "ignored data",
        {"code": {"named": {"data/x.jsonl": "not sent"}}},
        ["'data/x.jsonl' is here, but git ignores it", ".gitignore"],
    ),
    (
        "missing data",
        {"code": {"named": {"data/x.jsonl": "missing"}}},
        ["'data/x.jsonl' does not exist in /repo"],
    ),
    (
        "source checkpoint",
        {"output__source_checkpoint": "/x/ckpt"},
        [
            "'/x/ckpt' does not exist on gpu-7 (output.source_checkpoint)",
            "checkpoints/<stage>/latest",
        ],
    ),
    (
        "relative source",
        {"output__source_checkpoint": "ckpt"},
        ["source_checkpoint='ckpt' is not absolute"],
    ),
    ("absolute model", {"model__name": "/m"}, ["'/m' does not exist on gpu-7 (model.name)"]),
    (
        "secret",
        {"host__secrets": ["SET", "UNSET"]},
        ["the secret UNSET is not set here", "export UNSET"],
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"), [case[1:] for case in PROBLEMS], ids=[case[0] for case in PROBLEMS]
)
def test_each_problem(changes: dict[str, Any], expected: list[str]) -> None:
    """Goal: each reason against a run is one problem with the value and the fix. Red with its check taken out."""
    problems = plan_for(**changes).problems
    assert len(problems) == 1, [problem.message for problem in problems]
    text = problems[0].text()
    for part in expected:
        assert part in text


def test_no_problem() -> None:
    """Goal: a host that has everything is accepted, hub ids too. Red with a hub id taken for a missing path."""
    assert plan_for().problems == ()
    hub = {"named": {"Qwen/Qwen2.5-0.5B-Instruct": "missing", "gsm8k": "missing"}}
    assert plan_for(code=hub).problems == ()
    # live, of the same experiment: it has its own port
    assert plan_for(facts={"runs": (RUN_ROW,)}).problems == ()
    assert plan_for(facts={"gpus": (BUSY,)}).problems == (), "a cpu config does not care for GPUs"


def test_all_problems_at_once() -> None:
    """Goal: one try shows everything that is wrong. Red with the first problem raised."""
    plan = plan_for(facts={"tools": {}, "ports_in_use": (30180,)}, code={"constraints": None})
    assert len(plan.problems) == 4
    text = DeployError.of(plan.problems).text()
    assert text.count("error: ") == 4 and text.endswith("Nothing was started.")


def test_the_form_of_an_error() -> None:
    """Goal: message, found, needed, fix, in this order. Red with the fix before what was found."""
    plan = plan_for(**CUDA, engine__gpu_ranks=[1])
    first, found, needed, fix, last = DeployError.of(plan.problems).text().splitlines()
    assert first.startswith("error: gpu-7 has 1 GPU")
    assert (found[:10], needed[:10], fix[:10]) == ("  found   ", "  needed  ", "  fix     ")
    assert last == "Nothing was started."


def torchrun(python: str, run: str, stage: str, ranks: int) -> str:
    """torchrun with its store in a file: in a socket, whoever reaches it has the trainer unpickle what he writes."""
    store = f"--rdzv-backend c10d --rdzv-conf store_type=file --rdzv-id {run.rpartition('/')[2]}"
    place = f"--rdzv-endpoint {run}/.rendezvous-{stage}.tmp --local-addr 127.0.0.1"
    return f"{python} -m torch.distributed.run {store} {place} --nnodes 1 --nproc-per-node {ranks}"


def test_the_launch_plan() -> None:
    """Goal: the exact command lines, for two ranks on GPUs. Red with RL's engine served from model.name."""
    gpus = tuple(dataclasses.replace(H200, index=i, uuid=str(i)) for i in range(3))
    plan = plan_for(**CUDA, target__gpu_ranks=[0, 2], engine__gpu_ranks=[1], facts={"gpus": gpus})
    launch = plan.launch
    assert plan.problems == () and launch is not None
    run, (environment,) = "/home/u/.rollouts/runs/r1", launch.environments
    assert launch.run_path == run and environment.path.startswith("/home/u/.rollouts/envs/")
    sft, rl = launch.stages
    trainer = f"-m rollouts.worker.trainer --run-dir {run} --stage"
    python = f"{environment.path}/bin/python"
    assert " ".join(sft.trainer.argv) == f"{torchrun(python, run, 'sft', 2)} {trainer} sft"
    line = f"{torchrun(python, run, 'rl', 2)} {trainer} rl --engine-url http://127.0.0.1:30180"
    assert " ".join(rl.trainer.argv) == line
    # by themselves they listen on an address of the host's
    for spec in (sft.trainer, engine := rl.engines[0]):
        assert (spec.env["GLOO_SOCKET_IFNAME"], spec.env["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    assert engine.argv[engine.argv.index("--model-path") + 1] == f"{run}/checkpoints/sft/latest"
    assert engine.ready_url == "http://127.0.0.1:30180/ready"
    assert (sft.trainer.env["CUDA_VISIBLE_DEVICES"], engine.env["CUDA_VISIBLE_DEVICES"]) == (
        "0,2",
        "1",
    )
    assert sft.trainer.env["OMP_NUM_THREADS"] == "1" and sft.trainer.env["HF_HUB_OFFLINE"] == "1"
    assert (sft.needs_checkpoint, rl.needs_checkpoint) == (None, f"{run}/checkpoints/sft/latest")
    assert LaunchPlan.from_json(json.loads(json.dumps(dataclasses.asdict(launch)))) == launch


@pytest.mark.parametrize(
    ("changes", "model_path"),
    [
        ({}, "/home/u/.rollouts/runs/r1/code/tree/configs/models/tiny_qwen2"),
        ({"model__name": "Qwen/Qwen2.5-0.5B"}, "Qwen/Qwen2.5-0.5B"),
        (
            {"output__source_checkpoint": "/x/ckpt", "facts": {"paths": {"/x/ckpt": True}}},
            "/x/ckpt",
        ),
    ],
)
def test_what_the_engine_serves_without_sft(changes: dict[str, Any], model_path: str) -> None:
    """Goal: RL alone starts from the source checkpoint, else the model. Red with the checkpoint passed over."""
    launch = plan_for(output__mode="rl", **changes).launch
    assert launch is not None
    argv = launch.stages[0].engines[0].argv
    assert (
        argv[argv.index("--model-path") + 1] == model_path
        and launch.stages[0].needs_checkpoint is None
    )


@pytest.mark.parametrize(("engine_max", "restarts_max"), [(3, 3), (0, 0), (None, 0)])
def test_the_engines_lives(engine_max: int | None, restarts_max: int) -> None:
    """Goal: engine.restarts_max and limits.engine_hang_timeout_s reach the supervisor; without an engine there is
    nothing to restart. Red with either left at a constant."""
    changes = (
        {"engine": None, "output__mode": "sft"}
        if engine_max is None
        else {"engine__restarts_max": engine_max}
    )
    launch = plan_for(limits__engine_hang_timeout_s=7.0, **changes).launch
    assert launch is not None
    assert (launch.engine_restarts_max, launch.engine_hang_timeout_s) == (restarts_max, 7.0)


def test_a_lock_is_read() -> None:
    """Goal: comments go, a mark sorts. Red with any comment taken for the mark."""
    assert read_lock(LOCK) == (["fastapi==1.0", "torch==2.13.0"], ["sglang==0.5.21"])
    assert read_lock("") == ([], [])


def test_an_engine_with_a_lock_has_its_own_environment() -> None:
    """Goal: two environments with two keys, the lock's lines in the engine's, the trainer's as before; --plan shows
    both, and each command line has its own Python. Red with the lock's lines added to the trainer's."""
    plan = plan_for(**CUDA, **HALF, **SGLANG)
    assert plan.problems == () and plan.launch is not None
    trainer, engine = plan.launch.environments
    assert trainer == plan_for().launch.environments[0]  # type: ignore[union-attr]
    assert (engine.name, engine.requirements, engine.requirements_no_deps, engine.constraints) == (
        "engine",
        ["fastapi==1.0", "torch==2.13.0"],
        ["sglang==0.5.21"],
        "",
    )
    assert trainer.path != engine.path
    rl = plan.launch.stages[1]
    assert rl.trainer.argv[0] == f"{trainer.path}/bin/python"
    assert rl.engines[0].argv[0] == f"{engine.path}/bin/python"
    steps = [step for step in plan.steps if " environment " in step.what]
    assert [step.what.split()[2] for step in steps] == ["trainer", "engine"]
    assert steps[1].why.startswith("3 requirements of requirements/sglang-cuda.txt, Python 3.11.2")
    missing = plan_for(**{**SGLANG, "code": {"engine_requirements": None}})
    assert missing.launch is None
    (problem,) = missing.problems
    assert (
        "engine.requirements_file='requirements/sglang-cuda.txt' is not in /repo" in problem.text()
    )


def test_a_path_of_ones_own_beside_the_engines() -> None:
    """Goal: PYTHONPATH in host.env comes after what SGLang needs on a CPU. Red with the one in place of the other: the
    engine found no sgl_kernel."""
    own = {"host__env": {"PYTHONPATH": "/mine"}, "engine__max_total_tokens": 4096}
    plan = plan_for(**{**SGLANG, **own})
    assert plan.problems == () and plan.launch is not None
    rl = plan.launch.stages[1]
    tree = f"{plan.launch.run_path}/code/tree"
    assert rl.engines[0].env["PYTHONPATH"] == f"{tree}/rollouts/engines/sglang/cpu_stubs:/mine"
    assert rl.trainer.env["PYTHONPATH"] == "/mine"


def test_replicas_have_ports_and_devices_of_their_own() -> None:
    """Goal: two replicas of two devices: consecutive ports, devices split in order, all URLs to the trainer. Red with
    every replica on all devices."""
    gpus = tuple(dataclasses.replace(H200, index=i, uuid=str(i)) for i in range(5))
    plan = plan_for(
        **CUDA,
        **HALF,
        **SGLANG,
        facts={"gpus": gpus},
        engine__replicas=2,
        engine__tensor_parallel_size=2,
        engine__gpu_ranks=[1, 2, 3, 4],
    )
    assert plan.problems == () and plan.launch is not None
    rl = plan.launch.stages[1]
    assert [engine.window for engine in rl.engines] == ["engine-0", "engine-1"]
    assert [engine.env["CUDA_VISIBLE_DEVICES"] for engine in rl.engines] == ["1,2", "3,4"]
    assert [engine.argv[engine.argv.index("--port") + 1] for engine in rl.engines] == [
        "30180",
        "30181",
    ]
    assert [engine.ready_url for engine in rl.engines] == [
        f"http://127.0.0.1:{port}/ready" for port in (30180, 30181)
    ]
    assert rl.trainer.argv[-4:] == [
        "--engine-url",
        "http://127.0.0.1:30180",
        "--engine-url",
        "http://127.0.0.1:30181",
    ]
    config = replace_at(
        replace_at(example_config(), "engine.replicas", 2), "engine.gpu_ranks", [0, 1]
    )
    assert required_ports(config) == [30180, 30181]


def test_a_router_is_in_front_of_the_replicas() -> None:
    """Goal: a window more, after the replicas', in their environment and without a GPU; --plan shows its command line;
    the trainer gets its URL beside theirs, and its port must be free. Red with the router's window left out."""
    routed: dict[str, Any] = {
        "engine__replicas": 2,
        "engine__gpu_ranks": [0, 1],
        "engine__router_port": 31000,
    }
    gpus = (H200, dataclasses.replace(H200, index=1, uuid="1"))
    plan = plan_for(
        **CUDA, **HALF, **SGLANG, **routed, facts={"gpus": gpus}, limits__sample_timeout_s=7.5
    )
    assert plan.problems == () and plan.launch is not None
    rl = plan.launch.stages[1]
    assert [engine.window for engine in rl.engines] == ["engine-0", "engine-1", "router"]
    router = rl.engines[-1]
    assert router.argv[0] == rl.engines[0].argv[0] and router.env["CUDA_VISIBLE_DEVICES"] == ""
    assert router.ready_url == "http://127.0.0.1:31000/readiness"
    line = "-m rollouts.engines.sglang.router_launcher --host 127.0.0.1 --port 31000 --worker-urls http://127.0.0.1:30180"
    assert (
        f"{line} http://127.0.0.1:30181 --request-timeout-secs 8 --policy cache_aware"
        in " ".join(router.argv)
    )
    (step,) = (step for step in plan.steps if step.what.startswith("rl: router: "))
    assert line in step.what and step.why.startswith("on no GPU of ")
    assert rl.trainer.argv[-2:] == ["--router-url", "http://127.0.0.1:31000"]
    assert rl.trainer.argv.count("--engine-url") == 2
    assert required_ports(replace_at(example_config(), "engine", sglang(router_port=31000))) == [
        30180,
        31000,
    ]


def test_the_environment_key() -> None:
    """Goal: equal content, equal key; any other input, another key. Red with the constraints left out of it."""
    base: tuple[Any, ...] = (["a", "b"], "a==1", "pip", "3.11.2", "linux-x86_64")
    key = environment_key(*base)
    assert key == environment_key(["b", "a"], *base[1:])
    others: list[Any] = [["a"], "a==2", "uv", "3.12.0", "linux-aarch64"]
    keys = {environment_key(*base[:i], other, *base[i + 1 :]) for i, other in enumerate(others)}
    keys.add(environment_key(*base, no_deps=["c"]))
    assert len(keys) == 6 and key not in keys


def test_steps_say_why() -> None:
    """Goal: --plan tells what is reused and what is built, and why. Red with the environments of the host not read."""
    launch = plan_for().launch
    assert launch is not None
    key = Path(launch.environments[0].path).name
    building, reusing = plan_for(), plan_for(facts={"environments": (key,)})
    assert building.steps[1].what.startswith("build the trainer environment")
    assert reusing.steps[1].what.startswith("reuse the trainer environment")
    assert building.steps[0].why == "git's files at 0123456789 with 1 uncommitted changes"


def test_what_is_asked_of_the_host() -> None:
    """Goal: only what matters to this config is asked. Red with the port asked for an sft run."""
    config = replace_at(example_config(), "output.source_checkpoint", "/x")
    assert required_ports(config) == [30180] and required_paths(config) == ["/x"]
    assert required_ports(replace_at(config, "output.mode", "sft")) == []


def test_a_replay_starts_no_engine() -> None:
    """Goal: saved rollouts need no engine, port or engine device, and must be there. Red with the engine launched."""
    source = "/runs/a/rollouts.jsonl"
    config = replace_at(
        replace_at(example_config(), "output.mode", "rl"), "rl.sampling.source", source
    )
    assert required_ports(config) == [] and required_paths(config) == [source]
    changes: dict[str, Any] = {
        **CUDA,
        "output__mode": "rl",
        "rl__sampling__source": source,
        "engine__gpu_ranks": [7],
    }
    plan = plan_for(**changes, facts={"gpus": (H200,), "paths": {source: True}})
    assert plan.problems == () and plan.launch is not None
    (stage,) = plan.launch.stages
    assert stage.engines == [] and "--engine-url" not in stage.trainer.argv
    missing = plan_for(**changes, facts={"gpus": (H200,)})
    assert any(source in problem.message for problem in missing.problems)
    engine_only = plan_for(output__mode="rl", rl__sampling__source="engine_only").launch
    assert engine_only is not None and len(engine_only.stages[0].engines) == 1


def test_a_hubs_model_is_downloaded_first() -> None:
    """Goal: a hub id is downloaded in the bootstrap, with weights only where they are read; what is sent or lies on the
    host is not. Red with each name of the config downloaded."""
    hub = {
        "model__name": "Qwen/Q",
        "model__init": "pretrained",
        "code": {"named": {"Qwen/Q": "missing", "K/r": "missing"}},
    }
    for changes, expected in (
        ({}, []),
        ({"model__name": "/models/q", "facts": {"paths": {"/models/q": True}}}, []),
        (hub, [("Qwen/Q", True)]),
        ({**hub, "model__init": "random"}, [("Qwen/Q", False)]),
        (
            {**hub, "output__source_checkpoint": "/x", "facts": {"paths": {"/x": True}}},
            [("Qwen/Q", False)],
        ),
        ({**hub, "rl__kl": kl(reference="K/r")}, [("Qwen/Q", True), ("K/r", True)]),
        ({**hub, "rl__kl": kl(reference="K/r"), "output__mode": "sft"}, [("Qwen/Q", True)]),
    ):
        plan = plan_for(**changes)  # type: ignore[arg-type]
        assert plan.launch is not None
        assert [(model.name, model.weights) for model in plan.launch.models] == expected
        steps = [step.what for step in plan.steps if step.what.startswith("download ")]
        assert len(steps) == len(expected)
    read = LaunchPlan.from_json(json.loads(json.dumps(dataclasses.asdict(plan.launch))))
    assert read == plan.launch


def test_the_plan_of_an_older_version_is_read() -> None:
    """Goal: a run that an earlier version planned can be followed: its plan lacks the later fields. Red with one of
    them required."""
    launch = plan_for(**CUDA, **SGLANG, host__torch_build="index").launch
    assert launch is not None
    data = json.loads(json.dumps(dataclasses.asdict(launch)))
    del data["models"]
    for environment in data["environments"]:
        for name in ("torch_build", "torch_fallback", "python_version"):
            del environment[name]
    for spec in (
        spec for stage in data["stages"] for spec in (*stage["engines"], stage["trainer"])
    ):
        del spec["tools_of"]
    older = LaunchPlan.from_json(data)
    assert older.models == [] and {spec.torch_build for spec in older.environments} == {"index"}
    assert [stage.trainer.argv for stage in older.stages] == [
        stage.trainer.argv for stage in launch.stages
    ]


def test_trackers_have_their_own_environments() -> None:
    """Goal: each tracker has a window, an environment of its package alone, its settings as variables, and files of its
    own where the docs say; a missing key is a warning, a package that nobody names a problem; earlier versions read a
    plan without trackers."""
    trackers = [
        Wandb(project="letters", offline=False),
        Mlflow(project="letters", tracking_uri="https://mlflow.example.org"),
        TensorBoard(project="letters", directory="/data/tb"),
    ]
    packages = {kind: (f"{kind}>=1",) for kind in ("wandb", "mlflow", "tensorboard")}
    made = plan_for(output__trackers=trackers, code={"tracker_requirements": packages})
    assert made.problems == () and made.launch is not None
    assert any("WANDB_API_KEY is not in host.secrets" in text for text in made.warnings)
    wandb, mlflow, tensorboard = made.launch.trackers
    assert [spec.process.window for spec in made.launch.trackers] == [
        "tracker-wandb",
        "tracker-mlflow",
        "tracker-tensorboard",
    ]
    assert wandb.environment.requirements == ["wandb>=1"] and wandb.environment.constraints == ""
    assert len({spec.environment.path for spec in made.launch.trackers}) == 3
    run = made.launch.run_path
    assert wandb.process.argv[1:] == ["-m", "rollouts.view.feed", run, "wandb", "letters", run]
    assert wandb.process.env["WANDB_MODE"] == "online"
    assert mlflow.process.env["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"
    assert tensorboard.process.argv[-1] == "/data/tb"
    assert LaunchPlan.from_json(json.loads(json.dumps(made.launch.to_json()))) == made.launch
    without = plan_for(output__trackers=trackers, code={"tracker_requirements": {}})
    assert ["'wandb' has no package" in p.message for p in without.problems] == [True, False, False]
    none = plan_for()
    assert none.launch is not None and "trackers" not in none.launch.to_json()
