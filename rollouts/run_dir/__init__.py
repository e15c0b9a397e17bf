"""The run directory: every file name and format that the two sides share, and atomic writes. Standard library only.

On the host it is `<home>/runs/<run_id>/`; what the control side pulls is a mirror of the same layout at
`<save_dir>/<experiment_name>/<run_id>/`. docs/reference/run-directory.md describes the formats for people.

```
config.json  plan.json  code/{tree/,manifest.json,commit.txt,dirty.diff,…}   what ran
status.json  events.jsonl  supervisor.lock                                   where it is
metrics.jsonl  rollouts.jsonl  eval.jsonl  eval_samples.jsonl                what it learned
logs/<window>.log  exit/<stage>-<window>.json  processes/<name>.json         what the processes said, how they ended
checkpoints/{sft,rl}/step_000100/  latest                                    models
```

Who writes what: the launcher config.json, plan.json and code/; the supervisor status.json; supervisor and trainer
append to events.jsonl (one write per line); the trainer writes metrics, rollouts, eval and checkpoints; each window's
wrapper its log and its exit file; every process that leads a process group its own record in processes/.
"""

from rollouts.run_dir.files import (
    FULL_DISK,
    RESERVE_BYTES,
    append_jsonl,
    iter_jsonl,
    last_jsonl_row,
    make_reserve,
    parse_row,
    read_jsonl,
    read_rows,
    tail_lines,
    write_bytes_atomic,
    write_json_atomic,
    write_on_full_disk,
    write_text_atomic,
)
from rollouts.run_dir.layout import (
    ENVIRONMENT_GLOB,
    EXPERIMENT_NAME_PATTERN,
    FINAL_STATES,
    GPUS_VARIABLE,
    HOME_VARIABLE,
    LOG_GLOB,
    RUN_ID_VARIABLE,
    RUN_PATH_VARIABLE,
    SMOKE_STAGE,
    SNAPSHOT_BYTES_MAX,
    SNAPSHOT_GLOBS,
    STREAMED_FILES,
    RunDir,
    StageName,
    State,
    home_dir,
    life_name,
    run_path,
    valid_run_id,
)
from rollouts.run_dir.liveness import (
    SILENT_S,
    START_WAIT_S,
    Observed,
    hold_lock,
    is_live,
    launching,
    observe,
    wait_until_dead,
)
from rollouts.run_dir.records import (
    HEARTBEAT_S,
    EnvironmentSpec,
    ExitRecord,
    HubModel,
    LaunchPlan,
    ProcessRecord,
    ProcessSpec,
    SmokeCheck,
    StageSpec,
    Status,
    append_event,
    host_identity,
    is_elsewhere,
    other_host,
    read_exit,
    read_launch_host,
    read_launch_id,
    read_plan,
    read_status,
    record_process,
)
from rollouts.run_dir.transient import (
    clean_up,
    remove_transient,
    write_secrets,
)

__all__ = [
    "ENVIRONMENT_GLOB",
    "EXPERIMENT_NAME_PATTERN",
    "FINAL_STATES",
    "FULL_DISK",
    "GPUS_VARIABLE",
    "HEARTBEAT_S",
    "HOME_VARIABLE",
    "LOG_GLOB",
    "RESERVE_BYTES",
    "RUN_ID_VARIABLE",
    "RUN_PATH_VARIABLE",
    "SILENT_S",
    "SMOKE_STAGE",
    "SNAPSHOT_BYTES_MAX",
    "SNAPSHOT_GLOBS",
    "START_WAIT_S",
    "STREAMED_FILES",
    "EnvironmentSpec",
    "ExitRecord",
    "HubModel",
    "LaunchPlan",
    "Observed",
    "ProcessRecord",
    "ProcessSpec",
    "RunDir",
    "SmokeCheck",
    "StageName",
    "StageSpec",
    "State",
    "Status",
    "append_event",
    "append_jsonl",
    "clean_up",
    "hold_lock",
    "home_dir",
    "host_identity",
    "is_elsewhere",
    "is_live",
    "iter_jsonl",
    "last_jsonl_row",
    "launching",
    "life_name",
    "make_reserve",
    "observe",
    "other_host",
    "parse_row",
    "read_exit",
    "read_jsonl",
    "read_launch_host",
    "read_launch_id",
    "read_plan",
    "read_rows",
    "read_status",
    "record_process",
    "remove_transient",
    "run_path",
    "tail_lines",
    "valid_run_id",
    "wait_until_dead",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_on_full_disk",
    "write_secrets",
    "write_text_atomic",
]
