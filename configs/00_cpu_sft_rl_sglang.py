"""configs/00_cpu_sft_rl.py with its engine switched to the real SGLang, on a CPU: the path that a GPU host takes.

SGLang gets a separate environment (2.7 GB, made once per host). Half the RL steps, at higher rates: a step takes
longer here, since SGLang is made for other sizes. `--show` prints every field of the config.

    deploy configs/00_cpu_sft_rl_sglang.py
"""

from pathlib import Path

from base_config import DiskSync, SGLang, changed, load_config

config = changed(
    load_config(Path(__file__).with_name("00_cpu_sft_rl.py")),
    {
        "output.experiment_name": "cpu_sft_rl_sglang",
        "host.disk_free_gib_min": 10.0,
        "engine": SGLang(
            hosts=None,
            requirements_file="requirements/sglang-cpu.txt",
            gpu_ranks=[0],
            sglang_port=30180,
            replicas=1,
            router_port=None,
            tensor_parallel_size=1,
            mem_fraction=0.5,
            context_length=64,
            max_total_tokens=65_536,  # without a bound SGLang takes most of a host's memory
            max_running_requests=512,
            weight_sync=DiskSync(on_tmpfs=False),
            sleep_while_training=False,
            restarts_max=3,
        ),
        "limits.engine_ready_timeout_s": 300.0,
        "rl.num_epochs": 1,  # of 4,800 prompts: 150 steps
        "rl.unembedding_lr": 7e-4,
        "rl.embedding_lr": 7e-4,
        "rl.matrix_lr": 7e-4,
    },
)
