"""Values that are right alone and not together: what the config says of them."""

import dataclasses
from typing import Any

import pytest

from base_config import (
    CISPO,
    GRPO,
    GSPO,
    PPO,
    VLLM,
    Config,
    DiskSync,
    TensorSync,
)
from tests.config.parts import a_lora, agent, muon_optimizer, with_changes
from tests.example_config import (
    ahead,
    example_config,
    importance,
    like_example,
    policy_loss,
    replace_at,
    sglang,
    value_model,
)


@pytest.mark.parametrize("name", ["clip_low", "updates_per_batch", "importance", "dual_clip"])
def test_a_loss_has_the_fields_that_it_uses(name: str) -> None:
    """Goal: a setting without effect cannot be written. Red with `dual_clip` a field of every clipped loss."""
    has = {
        kind.__name__
        for kind in (GRPO, PPO, GSPO, CISPO)
        if name in {f.name for f in dataclasses.fields(kind)}
    }
    expected = {"importance": {"GRPO"}, "dual_clip": {"PPO", "GSPO"}}
    assert has == expected.get(name, {"PPO", "GSPO", "CISPO"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"engine.router_port": None}, None),
        (
            {"engine.replicas": 1, "engine.gpu_ranks": [0]},
            "engine.router_port=31000: needs None, or more replicas",
        ),
        ({"engine.router_port": 80}, "engine.router_port=80: needs 1024 to 65535, or None"),
        (
            {"engine.router_port": 30181},
            "engine.router_port=30181: needs another port: 30180 to 30181 are the",
        ),
    ],
)
def test_what_a_router_needs(changes: dict[str, Any], reason: str | None) -> None:
    """Goal: a router is in front of several SGLang replicas, on its own port, or is refused with the reason.
    Red with each check left out."""
    routed = sglang(restarts_max=1, replicas=2, gpu_ranks=[0, 1], router_port=31000)
    config = replace_at(example_config(), "engine", routed)
    for path, value in changes.items():
        config = replace_at(config, path, value)
    assert [problem[: len(reason or "")] for problem in config.problems()] == (
        [reason] if reason else []
    )


DISK = DiskSync(on_tmpfs=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine.hosts": [1], "engine.weight_sync": DISK}, None),
        ({"engine.hosts": [0], "engine.weight_sync": TensorSync(bucket_mib=64)}, None),
        ({"engine.hosts": []}, "engine.hosts=[]: needs hosts of the job by number"),
        ({"engine.hosts": [0, 0]}, "engine.hosts=[0, 0]: needs hosts of the job by number"),
        ({"engine.hosts": [-1]}, "engine.hosts=[-1]: needs hosts of the job by number"),
        (
            {"engine.hosts": [2], "engine.weight_sync": DISK},
            "engine.hosts=[2]: needs every number up to the last: host 1 would have no part",
        ),
        ({"engine.hosts": [2], "engine.weight_sync": DISK, "target.hosts": 2}, None),
        ({"engine.hosts": [1], "engine.weight_sync": DISK, "limits.restarts_max": 1}, None),
        (
            {
                "engine.hosts": [0, 1],
                "engine.weight_sync": DISK,
                "limits.restarts_max": 1,
                "target.hosts": 2,
            },
            "target.hosts_min=1: needs target.hosts=2 with engine.hosts: no host takes over another's",
        ),
        (
            {"engine.hosts": [1], "engine.weight_sync": TensorSync(bucket_mib=64)},
            "engine.weight_sync=TensorSync(bucket_mib=64): needs DiskSync with engine.hosts=[1]: no other",
        ),
        (
            {"engine": sglang(hosts=[0, 1], weight_sync=TensorSync(bucket_mib=64))},
            "engine.weight_sync=TensorSync(bucket_mib=64): needs BroadcastSync or DiskSync with engine",
        ),
        (
            {
                "engine": sglang(
                    hosts=[1], replicas=2, gpu_ranks=[0, 1], router_port=31000, weight_sync=DISK
                )
            },
            "engine.router_port=31000: needs None, or 0 among engine.hosts",
        ),
        ({"engine": sglang(hosts=[0, 1], router_port=31000, weight_sync=DISK)}, None),
        (
            {"engine.hosts": [1], "engine.weight_sync": DISK, "target.device_type": "mps"},
            "target.hosts=1, engine.hosts=[1]: needs one host: target.device_type='mps'",
        ),
    ],
)
def test_where_engines_run(changes: dict[str, Any], reason: str | None) -> None:
    """Goal: hosts with engines are part of the job, and weights reach them, or the config is refused with the fix."""
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path, value)
    assert [problem[: len(reason or "")] for problem in config.problems()] == (
        [reason] if reason else []
    )


def test_vllm_samples_from_the_whole_distribution() -> None:
    """Goal: a sampler's log-probs are the model's, or the config is refused."""
    engine = like_example(VLLM, example_config().engine, requirements_file="locks/v.txt")
    config = replace_at(example_config(), "engine", engine)
    assert config.problems() == ()
    (problem,) = replace_at(config, "rl.top_k", 20).problems()
    assert problem.startswith("rl.top_k=20: needs -1 with engine=VLLM")


def test_sglangs_cache_holds_a_whole_sequence() -> None:
    """Goal: engine.context_length tokens fit, since SGLang cuts answers short without a word where they do not. Red
    without the check."""
    config = replace_at(example_config(), "engine", sglang())
    assert replace_at(config, "engine.max_total_tokens", 2048).problems() == ()
    (problem,) = replace_at(config, "engine.max_total_tokens", 2047).problems()
    assert problem.startswith(
        "engine.max_total_tokens=2047: needs at least engine.context_length=2048, or None"
    )


@pytest.mark.parametrize("field", ["replicas", "tensor_parallel_size"])
def test_no_devices_are_asked_for_nothing(field: str) -> None:
    """Goal: a count of 0 is told as that, not as devices that are too many. Red with `needs length 0` beside it."""
    problems = replace_at(example_config(), "engine", sglang(**{field: 0})).problems()
    assert not any("engine.gpu_ranks" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"rl.ahead.in_flight_updates": True}, None),
        ({"rl.loss": policy_loss(dual_clip=None)}, None),
        (
            {"rl.sampling.sync_every": 2},
            "rl.ahead.policy_lag_steps_max=1: needs >= rl.sampling.sync_every=2",
        ),
        (
            {"rl.sampling.source": "engine_only"},
            "rl.ahead.policy_lag_steps_max=1: needs rl.ahead=None: rl.sampling.so",
        ),
        (
            {"engine": sglang(sleep_while_training=True)},
            "engine.sleep_while_training=True: needs False: with rl.ahead.policy_lag",
        ),
    ],
)
def test_what_running_ahead_needs(changes: dict[str, Any], reason: str | None) -> None:
    """Goal: a lag without correction, source or room is refused before a launch. Red with each check left out."""
    config = example_config()
    for path, value in {"rl.ahead": ahead(), "rl.loss.importance": importance(), **changes}.items():
        config = replace_at(config, path, value)
    problems = [problem for problem in config.problems() if "lag" in problem]
    assert [problem[: len(reason or "")] for problem in problems] == ([reason] if reason else []), (
        problems
    )


def test_a_sharded_model_may_be_compiled() -> None:
    """Goal: both together are a config. Red with the check that refused it, from when the body was compiled whole."""
    config = replace_at(
        replace_at(example_config(), "target.sharding", "full_shard"), "model.compile", True
    )
    assert config.problems() == ()


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (
            "rl.baseline",
            value_model(),
            "rl.baseline=ValueModel(gamma=1.0, gae_lambda=0.95, coef=0.5, clip=None",
        ),
        (
            "rl.sampling.source",
            "/runs/a/rollouts.jsonl",
            "data.eval_mixture: needs [] with target.sharding",
        ),
    ],
)
def test_what_a_sharded_model_cannot_do_in_rl(path: str, value: str, problem: str) -> None:
    """Goal: it is refused before a launch, and only with sharding. Red with each check left out."""
    config = replace_at(replace_at(example_config(), "rl.loss.advantage_norm", "none"), path, value)
    assert config.problems() == ()
    (found,) = replace_at(config, "target.sharding", "full_shard").problems()
    assert found.startswith(problem)


def test_only_what_samples_needs_an_engine_and_prompts() -> None:
    """Goal: a replay asks for no engine and no prompts, anything else does. Red with uses_engine always True."""
    config = replace_at(replace_at(example_config(), "engine", None), "data.rl_mixture", [])
    reasons = {
        source: [
            problem.split(":")[0]
            for problem in replace_at(config, "rl.sampling.source", source).problems()
        ]
        for source in ("engine", "engine_only", "/runs/a/rollouts.jsonl")
    }
    missing = ["data.rl_mixture=[]", "engine=None"]
    assert reasons == {"engine": missing, "engine_only": missing, "/runs/a/rollouts.jsonl": []}


def test_pass_at_more_than_was_sampled() -> None:
    """Goal: pass@k is estimated from at least k answers. Red with the upper bound left out."""
    config = replace_at(replace_at(example_config(), "eval.num_samples", 4), "eval.pass_at", [1, 5])
    assert config.problems() == ("eval.pass_at=[1, 5]: needs each k within 1 and num_samples=4",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        (
            {"split": "dev"},
            "data.sft_mixture[0].split='dev': needs 'train' or 'test': format='simple_spelling'",
        ),
        (
            {"subset": "main"},
            "data.sft_mixture[0].subset='main': needs None: format='simple_spelling' makes its rows",
        ),
        ({"shuffle_seed": 0}, "data.sft_mixture[0].shuffle_seed=0: needs None"),
        ({"streaming": True}, "data.sft_mixture[0].streaming=True: needs False"),
        (
            {"max_samples": -1},
            "data.sft_mixture[0].max_samples=-1: needs a number, or stop: format='simple_spelling'",
        ),
        ({"max_samples": -1, "stop": 9}, None),
    ],
)
def test_a_synthetic_data_set_has_its_own_rules(
    changes: dict[str, Any], reason: str | None
) -> None:
    """Goal: a setting that made rows would ignore is an error. Red for each with its check taken out."""
    fields = {"name": "spelling", "format": "simple_spelling", "max_samples": 5, **changes}
    config = example_config()
    for name, value in fields.items():
        config = replace_at(config, f"data.sft_mixture.0.{name}", value)
    assert [problem[: len(reason or "")] for problem in config.problems()] == (
        [reason] if reason else []
    )


def test_an_evaluation_of_rl_needs_prompts() -> None:
    """Goal: plain text has a validation loss, but RL evaluates answers. Red when any eval_mixture was enough."""
    config = replace_at(example_config(), "data.eval_mixture.0.format", "text")
    assert config.problems() == ()
    (problem,) = replace_at(config, "rl.eval_every", 5).problems()
    assert problem.startswith(
        "rl.eval_every=5: needs -1, or rows with prompts in data.eval_mixture"
    )


NANOCHAT = {
    "model.init": "pretrained",
    "sft.matrix_lr": 0.02,
    "sft.embedding_lr": 0.2,
    "sft.unembedding_lr": 0.004,
}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (NANOCHAT, ["sft.matrix_lr=0.02", "sft.embedding_lr=0.2"]),
        ({**NANOCHAT, "sft.init_lr_frac": 0.02}, ["sft.matrix_lr=0.02", "sft.embedding_lr=0.2"]),
        ({**NANOCHAT, "sft.optimizer": muon_optimizer()}, []),
        ({**NANOCHAT, "model.init": "random"}, []),
        ({**NANOCHAT, "output.mode": "rl"}, []),
        ({"model.init": "pretrained", "sft.matrix_lr": 0.01, "sft.init_lr_frac": 0.001}, []),
    ],
    ids=["whole", "scaled", "muon", "random", "other-stage", "tiny"],
)
def test_nanochat_s_rates_are_not_for_adamw_on_a_pretrained_model(
    changes: dict[str, Any], wrong: list[str]
) -> None:
    """Goal: refused with the fix where it is certain, and nowhere else. Red with any of its conditions left out."""
    problems = with_changes(changes).problems()
    assert [problem.split(":")[0] for problem in problems] == wrong
    assert all(
        "about 1e-5" in problem and "an optimizer with muon" in problem for problem in problems
    )


def test_lora_trains_its_adapters_at_matrix_lr_alone() -> None:
    """Goal: no rate without effect, and one with. Red without the check on matrix_lr."""
    rates = {
        f"{stage}.{name}": 0.0
        for stage in ("sft", "rl")
        for name in ("embedding_lr", "unembedding_lr")
    }
    lora = {"model.lora": a_lora(), **rates}
    assert with_changes(lora).problems() == ()
    problems = with_changes({**lora, "rl.matrix_lr": 0.0}).problems()
    assert [problem.split(":")[0] for problem in problems if "model.lora" in problem] == [
        "rl.matrix_lr=0.0"
    ]


@pytest.mark.parametrize("ranks", [[0], [0, 1], [0, 1, 2]])
def test_divisibility_counts_ranks(ranks: list[int]) -> None:
    """Goal: accumulation = target / (batch x ranks) must divide. Red when ranks were left out: 3 ranks passed."""
    problems = replace_at(example_config(), "target.gpu_ranks", ranks).problems()
    assert bool(problems) == (len(ranks) == 3), problems


def test_an_environment_may_reward_instead_of_a_function() -> None:
    """Goal: reward=None goes with an agent. Red with the check for any rl stage."""
    config = replace_at(replace_at(example_config(), "rl.agent", agent()), "rl.reward", None)
    assert config.problems() == () and Config.from_json(config.to_json()) == config
