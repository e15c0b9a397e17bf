"""The plan of a job on the hosts that are left of it: ranks are counted anew. Pure, standard library only."""

import dataclasses

from rollouts.run_dir import LaunchPlan, StageSpec

COUNT, OWN = "--nnodes", "--node-rank"  # torchrun's, as the plan has them


def on_hosts(plan: LaunchPlan, hosts: list[int]) -> LaunchPlan:
    """Return a host's plan where these hosts take part in the stages, itself among them: the same where all do.

    All hosts of a job that may lose one train. Where some only serve, the ranks are those of the others.
    """
    if plan.group is None or plan.group.rank not in hosts or len(hosts) == len(plan.group.hosts):
        return plan
    rank = hosts.index(plan.group.rank)
    stages = [_with_ranks(stage, rank, len(hosts)) for stage in plan.stages]
    return dataclasses.replace(plan, stages=stages)


def _with_ranks(stage: StageSpec, rank: int, count: int) -> StageSpec:
    if stage.trainer is None or COUNT not in stage.trainer.argv:
        return stage
    argv = list(stage.trainer.argv)
    argv[argv.index(COUNT) + 1], argv[argv.index(OWN) + 1] = str(count), str(rank)
    return dataclasses.replace(stage, trainer=dataclasses.replace(stage.trainer, argv=argv))
