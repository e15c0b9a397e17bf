"""A stage whose trainer was killed or crashed starts again from its last checkpoint. Standard library only.

Within limits.restarts_max, and only for what need not come again: `causes.may_pass` decides. All processes of the stage
have ended by then; the next life is the stage's own command lines, so its engines start anew, too.
"""

import contextlib
import json
import time
from pathlib import Path

from rollouts import run_dir
from rollouts.manifest import manifest_problems
from rollouts.plain_files import read_plain
from rollouts.run_dir import RunDir, StageSpec
from rollouts.worker.processes import SUPERVISOR_WINDOW
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.failures import PeerFailed, RunFailed
from rollouts.worker.supervise.pulse import POLL_S, Pulse


class Restarts:
    """How many restarts of stages the run has left, and what one does."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self.left = pulse.plan.restarts_max

    def settle(self, error: RunFailed) -> RunFailed:
        """Return the failure for which the stage starts again, on all hosts. Raises RunFailed where it does not."""
        pulse = self._pulse
        ends = isinstance(error, PeerFailed) and not error.may_pass  # another host is gone, or ends
        if ends or not self.left or pulse.run.stop_asked.exists():
            raise error
        agreed = pulse.peers.agree(error, self._wait, within_s=2 * pulse.plan.stop_grace_s)
        if not agreed.may_pass:
            raise agreed
        return agreed

    def _wait(self) -> None:
        self._pulse.beat()
        time.sleep(POLL_S)

    def prepare(self, stage: StageSpec, error: RunFailed) -> None:
        """Choose where the stage goes on, cut the rows after that, and clear what its last life left.

        Raises RunFailed where no step could be done again: the last one had been taken.
        """
        self.note_left()
        self.left -= 1
        self._go_back(stage, error)

    def take_up(self, stage: StageSpec) -> None:
        """Prepare a stage that an earlier start of the run's job began: that is none of the restarts that it has.

        Raises RunFailed as `prepare`.
        """
        why = "Slurm started the run's job again"
        self._go_back(stage, RunFailed(why, window=SUPERVISOR_WINDOW))

    def _go_back(self, stage: StageSpec, error: RunFailed) -> None:
        pulse, run = self._pulse, self._pulse.run
        step, checkpoint = None, None
        if pulse.plan.group is None or pulse.plan.group.leads:  # checkpoints and rows lie there
            step, checkpoint = self._origin(stage, error)
            first = stage.name == pulse.plan.stages[0].name
            run_dir.note_restart(run, stage.name, step, checkpoint, first=first)
        run_dir.remove_meetings(run)
        for spec in stage.processes():
            _keep_record(run, stage.name, spec.window)
        pulse.journal.event(
            "stage_restarted",
            stage=stage.name,
            step=step,
            checkpoint=checkpoint,
            reason=str(error),
            restarts_left=self.left,
        )
        say(f"stage={stage.name}: {error}; starting it again, {self.left} more left")

    def note_left(self) -> None:
        """Write down which hosts left the job, at the one that leads."""
        pulse = self._pulse
        for name, why in pulse.peers.take_left():
            assert pulse.plan.group is not None, "only a job of several hosts loses one"
            going_on = [pulse.plan.group.hosts[rank].name for rank in pulse.peers.hosts]
            pulse.journal.event("host_left", host=name, reason=why, hosts=going_on)
            say(f"{name} left the job: {why}; it goes on with {', '.join(going_on)}")

    def _origin(self, stage: StageSpec, error: RunFailed) -> tuple[int, str | None]:
        """Return (the last step that counts, its checkpoint or None) of the stage.

        A checkpoint of the last step comes before that step's row and evaluation: an earlier one has both.
        """
        run = self._pulse.run
        total = _steps_total(run, stage.name)
        found = sorted((run.checkpoints / stage.name).glob("step_*"), reverse=True)
        wholes = [path for path in found if self._is_whole(path)]
        earlier = [path for path in wholes if _step(path) != total]
        if wholes and not earlier:
            raise RunFailed(
                f"{error} (not started again: it had taken its last step, and has no earlier checkpoint)",
                window=error.window,
                exit_code=error.exit_code,
                log_tail=error.log_tail,
            )
        if earlier:
            return _step(earlier[0]), str(earlier[0].relative_to(run.path))
        return _first_step(run, stage.name), None

    def _is_whole(self, path: Path) -> bool:
        problems = self._pulse.run_in_thread(lambda: manifest_problems(path))
        if problems:
            message = f"{path.name} is damaged, and is left out: {problems[0]}"
            self._pulse.journal.event("note", message=message)
        return not problems


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _steps_total(run: RunDir, stage: str) -> int | None:
    rows = run_dir.iter_jsonl(run.events, having=b"training_started")
    totals = [row.get("steps_total") for row in rows if row.get("stage") == stage]
    return totals[-1] if totals else None


def _first_step(run: RunDir, stage: str) -> int:
    """Return the step that the stage itself begins after: above 0 where output.source_checkpoint is one of its own."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        source = json.loads(read_plain(run.config))["output"]["source_checkpoint"]
        metadata = json.loads(read_plain(Path(source) / "metadata.json"))
        return int(metadata["step"]) if metadata["stage"] == stage else 0
    return 0


def _keep_record(run: RunDir, stage: str, window: str) -> None:
    """Rename the exit record of the life that ended, so that the next life has none until it ends."""
    life = 1
    while run.exit(stage, run_dir.life_name(window, life)).exists():
        life += 1
    with contextlib.suppress(FileNotFoundError):  # its wrapper was killed
        run.exit(stage, window).replace(run.exit(stage, run_dir.life_name(window, life)))
