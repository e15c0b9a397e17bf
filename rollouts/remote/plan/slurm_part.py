"""A run that Slurm starts: what of its plan the node decides, and what the plan says of it. Pure."""

from collections.abc import Iterator
from dataclasses import replace

from rollouts.config import Config
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.gpus import CudaHost
from rollouts.remote.plan.host_part import own_config, part_of, serves_far
from rollouts.remote.plan.ports import free_ports_wanted
from rollouts.remote.plan.slurm_options import SlurmOptions, gpus_needed
from rollouts.remote.plan.slurm_script import limit_of, signal_s, slurm_script
from rollouts.run_dir import GroupHost, HostGroup, LaunchPlan, RunDir, SlurmSpec, run_path

STAND_IN_PORT = 990_000_001  # no port, and no other number of a plan
STAND_INS = 100  # of one node
NODE = "the job's node"


def first_stand_in(rank: int) -> int:
    """Return the first stand-in port of a node of the job."""
    return STAND_IN_PORT + rank * STAND_INS


def node_group(config: Config) -> HostGroup | None:
    """Return the nodes of a job of several, with stand-ins for what they tell each other when it starts."""
    if config.job_hosts == 1:
        return None
    engine = config.engine
    hosts = []
    for rank in range(config.job_hosts):
        serves = engine is not None and serves_far(config) and rank in config.engine_hosts
        first = first_stand_in(rank)
        engine_port = engine.sglang_port or first if engine is not None and serves else None
        host = GroupHost(
            target=f"node {rank} of the job",
            name=f"node-{rank}",
            address=f"node-{rank}.address",
            interface=f"node-{rank}.interface",
            trains=rank < config.target.hosts,
            engine_port=engine_port,
            receiver_port=_own_ports(config, rank)[0] if serves and rank else None,
        )
        hosts.append(host)
    supervisors, trainers = _own_ports(config, 0)
    return HostGroup(
        rank=0,
        hosts=hosts,
        supervisor_port=supervisors,
        trainer_port=trainers,
        fewer=config.fewer_hosts(),
    )


def _own_ports(config: Config, rank: int) -> list[int]:
    """Return the stand-ins beside those of engines: of the supervisors and of torchrun's store, or of a receiver."""
    first = first_stand_in(rank) + free_ports_wanted(config)
    return [first, first + 1] if rank == 0 else [first]


def on_nodes(facts: HostFacts, group: HostGroup | None) -> HostFacts:
    """Return a login host's facts less what a node has differently: GPUs, driver, memory, ports; and no tmux needed."""
    cuda = CudaHost(machine=facts.cuda.machine, libc=facts.cuda.libc)
    return replace(
        facts,
        host=NODE,
        tools={"tmux": "", **facts.tools},
        driver=None,
        gpus=(),
        gpu_problem="",
        gpu_processes=(),
        cuda=cuda,
        ram_mib=None,
        ports_in_use=(),
        free_port=first_stand_in(group.rank if group is not None else 0),
    )


def node_path(facts: HostFacts, run_id: str, group: HostGroup | None) -> str:
    """Return where a node has its part of the run: all nodes share the login host's home."""
    run = RunDir(run_path(facts.home, run_id))
    return str(run.path if group is None or group.leads else run.on_node(group.rank).path)


def with_slurm(launch: LaunchPlan, options: SlurmOptions, config: Config) -> LaunchPlan:
    """Return the launch plan of a node with the job that Slurm is given: once, with the first one's."""
    rank = launch.group.rank if launch.group is not None else 0
    own = _own_ports(config, rank) if launch.group is not None else []
    first = first_stand_in(rank)
    spec = SlurmSpec(
        script=slurm_script(options, config, launch) if rank == 0 else "",
        gpus=gpus_needed(own_config(config, part_of(config, launch.group))),
        ports=[*range(first, first + free_ports_wanted(config)), *own],
        requeue=options.has("requeue"),
    )
    return replace(launch, slurm=spec)


def slurm_notes(options: SlurmOptions, config: Config) -> Iterator[str]:
    """Say what the job asks for, and what only its node tells."""
    count = gpus_needed(config)
    gpus = f", {count} GPUs on each" if count else ""
    yield f"Slurm gets one job of {config.job_hosts} node(s){gpus}; devices are tried there"
    if config.job_hosts > 1:
        yield "the nodes meet at the addresses by which they reach each other, which the job tells when it starts"
    time = options.value("time")
    if limit_of(time) is not None and not options.has("signal"):
        yield f"{signal_s(time)} s before --time={time} is over, the run saves a checkpoint and ends"
    if count and config.host.torch_build == "auto":
        yield "the nodes' NVIDIA driver is not known here: torch's newest build; host.torch_build names another"


def slurm_warnings(options: SlurmOptions) -> Iterator[str]:
    """Say what is usually not meant."""
    if not options.has("time"):
        yield f"{options.file} has no --time: the partition's default limit counts"
    if not options.has("cpus-per-task", "cpus-per-gpu", "exclusive"):
        yield f"{options.file} has no --cpus-per-task: most clusters give one CPU a node then"
