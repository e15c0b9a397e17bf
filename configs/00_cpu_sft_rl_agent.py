"""Offline, two CPU cores, minutes: the demo's task as an agent's. A wrong answer is told by asking again, once.

The model and its data are those of 00_cpu_sft_rl.py. Episodes have one turn or two; an answer that is right at once
earns 1, at the second time 0.5, and nothing in between: so SFT goes a little further than the demo's, and RL samples
at a lower temperature, that some answers of most groups are right. `scripts/agent_learn_check` holds what it learns.
`environment` names a class of your own as well, beside this file. `--show` prints every field of the config.

    deploy configs/00_cpu_sft_rl_agent.py
"""

from pathlib import Path

from base_config import AgentConfig, changed, load_config

config = changed(
    load_config(Path(__file__).with_name("00_cpu_sft_rl.py")),
    {
        "output.experiment_name": "cpu_sft_rl_agent",
        "data.rl_mixture.0.max_samples": 1600,
        "sft.num_iterations": 60,  # 52 leave one sampled answer in 14 right, and RL learns little from so few
        "sft.eval_every": 30,
        "rl.agent": AgentConfig(
            environment="rollouts.agents.environment.AskAgain",
            tool_format="hermes",
            turns_max=2,
            tokens_max=64,
            timeout_s=600.0,
        ),
        "rl.reward": None,
        "rl.num_epochs": 1,  # of 1,600 prompts: 100 steps
        "rl.examples_per_step": 16,
        "rl.batch_size": 128,
        "rl.temperature": 0.7,
        "rl.unembedding_lr": 3e-4,
        "rl.embedding_lr": 3e-4,
        "rl.matrix_lr": 3e-4,
        "rl.optimizer.warmup_frac": 0.1,
    },
)
