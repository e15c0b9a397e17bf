"""What `deploy --help` prints: the documentation of the command."""

PAGE = """
Train a language model from one config file: SFT, then RL, here or on a GPU host over SSH.

\b
  deploy configs/00_cpu_sft_rl.py                          on this machine
  deploy configs/00_cpu_sft_rl.py --remote gpu-7           on an SSH host
  deploy configs/00_cpu_sft_rl.py --remote ubuntu@203.0.113.7:22
  deploy configs/00_cpu_sft_rl.py --remote gpu-7 --plan    what would happen
  deploy runs/cpu_sft_rl/RUN                               a run once more
  deploy --remote gpu-7                                    a look at it
  deploy doctor --remote gpu-7                             what stops a run
  deploy new my_run.py                                     write a config
  deploy explain rl.baseline                               what a field means
  deploy data my_run.py                                    its rows, as read

The config is checked first, every problem at once. Then: exactly the files that git lists in the repository where
you are, with your uncommitted changes, go to the host; it makes a virtual environment (or reuses the same one); one
tmux session runs the stages, with a window per process; results come back while it runs. Ctrl-C detaches, the run
goes on, and a killed deploy loses nothing:

\b
  deploy ls                      runs started here, as last seen
  deploy ls --state failed       some of them; --experiment, --since, --sort
  deploy ls --remote gpu-7       all runs on that host
  deploy status RUN              one look
  deploy attach RUN              follow again, from where you left off
  deploy resume RUN              go on from its last checkpoint, if it died
  deploy sweep NAME -f           the runs of a sweep to their end, a table
  deploy logs RUN -f             what a process prints, with --window NAME
                                 another (supervisor, trainer, engine-0);
                                 NAME@HOST
  deploy stop RUN                end it after a checkpoint; --now: at once
  deploy pull RUN                bring all results here, verified; one that
                                 was cut off goes on where it broke
  deploy cp RUN:PATH DEST        some files of it alone, to any place here
  deploy ssh RUN                 a shell in its directory on its host;
                                 `-- COMMAND` runs that
  deploy tag RUN NAME            another name for a run, of your own
  deploy rm RUN...               remove runs that are over, here and there
  deploy gc --remote gpu-7       list what takes room there, and remove it
  deploy forget RUN              drop this machine's record; the results stay
  deploy diff A B                two configs or runs, field by field
  deploy report RUN RUN          one HTML file: curves, answers, samples
  deploy track RUN --to wandb    copy it into a tracker: wandb, trackio,
                                 mlflow, tensorboard
  deploy ui                      a page in the browser: live, compared,
                                 every sample; --remote for a host's runs
  deploy plot RUN --metric M -o F.png
                                 one curve as a picture
  deploy offers --gpu H100       what clouds would rent out, by price
  deploy machines                what was rented, and what it costs
  ssh HOST -t tmux attach -t RUN the live processes

RUN is a name, the beginning of one, or `last`. A run started on another machine is found with --remote (deploy attach
RUN --remote gpu-7); from here it is followed, stopped and pulled, never launched.

\b
Options of deploy CONFIG:
  --remote [USER@]HOST[:PORT]  the host, as `ssh` knows it (ssh://... too);
                               this machine without it; once for each of
                               target.hosts
  --hosts FILE                 the same in a file: TARGET [ADDRESS] a line
  --plan                       print every step and every reason against it,
                               and stop
  --show                       print the whole config as a file that derives
                               from no other, and stop
  --json                       for programs: one JSON document for --plan,
                               --show, ls, status, stop, pull, logs; while
                               following, one object a line: {"type":
                               "progress" | "event" | "metrics" | "eval" |
                               "usage", …},
                               last {"type": "result" | "error", …}
  --set FIELD=VALUE            another value for a field of the config, as
                               rl.matrix_lr=1e-6; may be given several times.
                               FIELD=V1,V2 runs a sweep: each combination, one
                               run after another, and a table at the end
  --skip N                     leave out the first N runs of a sweep
  --yes                        rent without asking; start a sweep of more
                               than 20 runs
  --wait                       wait in a queue on the host until the GPUs and
                               ports of the config are free there; first come,
                               first served, this machine may be off
  --queue                      the same, on as many of any such GPUs; all
                               runs of a sweep are sent at once, and run side
                               by side where there is room
  --slurm FILE                 as a job of the Slurm on the login host that
                               --remote names; FILE has lines of #SBATCH
  --sky FILE                   write a task for `sky launch FILE`, on a cloud
                               or Kubernetes; nothing is started
  --at-once N                  so many runs without GPUs at a time; default 1
  --detach                     launch and return
  --run-id NAME                name of the run and its tmux session; default
                               <experiment_name>-<date>-<time>-<random>
  --busy-ok                    start on GPUs that others use too (a display,
                               an idle notebook); memory is not checked
  --accept-new-host-key        add the host's key to ~/.ssh/known_hosts if
                               none is known; a changed key never passes

\b
Options of deploy CONFIG, attach and pull:
  --no-checkpoints             leave the checkpoints on the host
  --only latest                bring the last one of each stage; while a run
                               is followed, each that is the last when its
                               turn comes
  --bwlimit RATE               use at most that much a second for what is
                               pulled: 500 or 500K (KiB), 2.5M, 10MB

\b
Files:
  <save_dir>/<experiment_name>/<run_id>/
                               here: config, metrics, rollouts, evaluations,
                               logs, checkpoints
  ~/.rollouts/runs/<run_id>/   the same on the host
                               ($ROLLOUTS_HOME in place of ~/.rollouts)
  ~/.rollouts/registry/        here: the runs that this machine knows, and
                               what a launch of them uses
  docs/reference/run-directory.md
                               every file and its format

\b
Exit codes:
  0     the job is done (or what was asked is)
  2     it could not start, and nothing was started; the message says why,
        and what to do
  130   Ctrl-C: detached, and the run goes on; or, before its launch, nothing
        was started. The message says which
  other the job's own exit code; 1 when it died, when its results could not
        be pulled, or when deploy failed after it was (or may be) launched
"""
