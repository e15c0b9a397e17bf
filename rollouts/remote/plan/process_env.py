"""The variables that a run's processes start with: devices, threads, where Python looks for modules. Pure."""

from rollouts.config import Config
from rollouts.engines.command_lines import LOOPBACK_ONLY, engine_env, group_env
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.repository import Code
from rollouts.run_dir import GPUS_VARIABLE, HostGroup, RunDir

PYTHONPATH = "PYTHONPATH"


def process_env(
    config: Config,
    facts: HostFacts,
    code: Code,
    run: RunDir,
    ranks: list[int],
    *,
    by_index: bool = False,
    group: HostGroup | None = None,
) -> dict[str, str]:
    interface = {} if group is None else group_env(group.hosts[group.rank].interface)
    return {
        "OMP_NUM_THREADS": str(config.host.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        **LOOPBACK_ONLY,
        **interface,
        **(
            _devices(facts, ranks, by_index=by_index) if config.target.device_type == "cuda" else {}
        ),
        **config.host.env,
        **_search_path(config, code, run),
    }


def _search_path(config: Config, code: Code, run: RunDir) -> dict[str, str]:
    """Return the variables by which a process in code/tree finds our modules: in a clone host.env's alone.

    PYTHONSAFEPATH keeps Python from looking into code/tree first: the trainer adds it last (`find_user_code`).
    """
    wanted = config.host.env.get(PYTHONPATH, "")
    if package := package_path(code, run):
        return {PYTHONPATH: ":".join(filter(None, (package, wanted))), "PYTHONSAFEPATH": "1"}
    return {PYTHONPATH: wanted} if wanted else {}


def _devices(facts: HostFacts, ranks: list[int], *, by_index: bool) -> dict[str, str]:
    """Name cards so that CUDA takes those that nvidia-smi showed: CUDA's own order is the fastest first.

    By UUID where all of them have one, else (and with `by_index`) by number in the order of the PCI bus. GPUS_VARIABLE
    has the numbers in both cases: by them one run's cards are told from another's.
    """
    uuids = {gpu.index: gpu.uuid for gpu in facts.gpus if gpu.uuid.startswith("GPU-")}
    numbers = ",".join(map(str, ranks))
    named = not by_index and all(rank in uuids for rank in ranks)
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(uuids[rank] for rank in ranks) if named else numbers,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        GPUS_VARIABLE: numbers,
    }


def engine_process_env(
    config: Config,
    facts: HostFacts,
    code: Code,
    run: RunDir,
    devices: list[int],
    *,
    group: HostGroup | None = None,
) -> dict[str, str]:
    engine = config.engine
    assert engine is not None
    program = package_path(code, run) or str(run.code_tree)
    own = engine_env(engine, device_type=config.target.device_type, tree=program)
    # SGLang's all-reduce and vLLM read the variable as integers
    by_index = engine.kind != "embedded"
    shared_env = process_env(config, facts, code, run, devices, by_index=by_index, group=group)
    env = {**own, **shared_env}
    if PYTHONPATH in own:
        shared = _search_path(config, code, run).get(PYTHONPATH, "")
        env[PYTHONPATH] = ":".join(filter(None, (own[PYTHONPATH], shared)))
    return env


def package_path(code: Code, run: RunDir) -> str:
    return str(run.code_package) if code.package is not None else ""
