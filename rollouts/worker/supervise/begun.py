"""A run whose job Slurm starts again: which stages are over, and which was under way. Standard library only."""

from rollouts import run_dir
from rollouts.run_dir import LaunchPlan, RunDir, StageSpec


def ended_stages(first: RunDir) -> list[str]:
    """Return the stages that the run has behind it, by the events of its first host: all hosts go by them."""
    ended: list[str] = []
    for row in run_dir.iter_jsonl(first.events):
        if row.get("kind") == "stage_ended":
            ended.append(str(row.get("stage")))
    return ended


def under_way(run: RunDir, plan: LaunchPlan) -> StageSpec | None:
    """Return the stage that an earlier start of the job began and did not end; None for none."""
    if plan.slurm is None or not plan.slurm.restarts:
        return None
    left = stages_left(run, plan)
    begun = {
        row.get("stage") for row in run_dir.iter_jsonl(run.first.events, having=b"stage_started")
    }
    return left[0] if left and left[0].name in begun else None


def stages_left(run: RunDir, plan: LaunchPlan) -> list[StageSpec]:
    """Return the stages that the run has before it: all, unless its job was started before."""
    if plan.slurm is None or not plan.slurm.restarts:
        return plan.stages
    ended = ended_stages(run.first)
    return [stage for stage in plan.stages if stage.name not in ended]
