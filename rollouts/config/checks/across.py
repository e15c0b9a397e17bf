"""Checks that no section can make alone."""

from rollouts.config.answer_limits import answer_limits, row_tokens_max
from rollouts.config.checks.engine import engine_fits, weight_sync_checks
from rollouts.config.checks.needs import Checks, must
from rollouts.config.checks.stage_checks import rate_checks
from rollouts.config.schema import Sections, ValueModel
from rollouts.data_formats import format_named

PRIVATE_NETWORKS = ["lambda"]  # rollouts.cloud.machine_types has the same


def cross_checks(config: Sections) -> Checks:
    """Check what no group can see alone. Runs only when every type is right."""
    mode, ranks, data = config.output.mode, max(1, config.target.world_size), config.data
    for name in config.stages:
        yield (
            getattr(config, name) is not None,
            f"{name}=None: output.mode={mode!r} has this stage, which needs it",
        )
        mixture = f"{name}_mixture"
        if name == "sft" or config.uses_engine:
            yield (
                bool(getattr(data, mixture)),
                f"data.{mixture}=[]: empty, and output.mode={mode!r} trains on it",
            )
        stage = getattr(config, name)
        if stage is not None and stage.eval_every != -1:
            need = "-1, or rows in data.eval_mixture, which is empty"
            yield must(bool(data.eval_mixture), f"{name}.eval_every", stage.eval_every, need)
    yield from _host_checks(config)
    yield from _answer_checks(config)
    if (
        config.rl is not None
        and "rl" in config.stages
        and config.rl.eval_every != -1
        and data.eval_mixture
    ):
        need = "-1, or rows with prompts in data.eval_mixture, which has plain text alone"
        asked = any(format_named(spec.format).has_prompts for spec in data.eval_mixture)
        yield must(asked, "rl.eval_every", config.rl.eval_every, need)
    if config.uses_engine:
        yield (
            config.engine is not None,
            f"engine=None: output.mode={mode!r} has an rl stage, which samples from it",
        )
        if config.engine is not None:
            yield from engine_fits(config, config.engine)
            yield from weight_sync_checks(config, config.engine)
    if (
        config.sft is not None
        and config.sft.batch_size >= 1
        and config.sft.micro_batch_tokens == -1
    ):
        target, per_pass = config.sft.target_examples_per_step, config.sft.batch_size * ranks
        need = f"a multiple of batch_size x ranks = {config.sft.batch_size} x {ranks}"
        yield must(target % per_pass == 0, "sft.target_examples_per_step", target, need)
    if config.engine is not None and config.engine.hosts is not None:
        hosts, fewest = config.target.hosts, config.target.hosts_min
        need = f"target.hosts={hosts} with engine.hosts: no host takes over another's engines"
        fits = fewest == hosts or config.limits.restarts_max == 0
        yield must(fits, "target.hosts_min", fewest, need)
    yield from _rl_checks(config, ranks)
    for name in config.stages:
        if getattr(config, name) is not None:
            yield from rate_checks(config, name)
    starts_rl = mode == "rl" and config.uses_engine and config.output.source_checkpoint is None
    noise = config.model.init == "random" and starts_rl
    yield (
        not noise,
        "model.init='random': output.mode='rl' would sample from noise; use 'sft+rl' or source_checkpoint",
    )


def _host_checks(config: Sections) -> Checks:
    """Check the hosts of the job together: each has a part, and there is a machine for it."""
    hosts, device = config.job_hosts, config.target.device_type
    named = [f"target.hosts={config.target.hosts}"]
    if config.engine is not None and config.engine.hosts is not None:
        named.append(f"engine.hosts={config.engine.hosts}")
    one, words = hosts == 1, ", ".join(named)
    if config.provision is not None and not one:
        networked = any(name in PRIVATE_NETWORKS for name in config.provision.providers)
        need = f"one whose single machines share a network, for several hosts: {PRIVATE_NETWORKS}"
        yield must(networked, "provision.providers", config.provision.providers, need)
    yield (
        one or device != "mps",
        f"{words}: needs one host: target.device_type='mps' is one machine's",
    )
    serving = range(config.target.hosts, hosts)
    idle = next((host for host in serving if host not in config.engine_hosts), None)
    need = f"every number up to the last: host {idle} would have no part in the job"
    yield must(idle is None, "engine.hosts", config.engine.hosts if config.engine else None, need)


def _answer_checks(config: Sections) -> Checks:
    """Check answers in process: what is held at once is a limit only if one row stays within it."""
    if any(answer_limits(config, stage) for stage in config.stages):
        room, held = config.eval.in_process_batch_tokens, row_tokens_max(config)
        need = f">= {held}: as many tokens as one row's answers may hold at once (data.max_length, eval.num_samples)"
        yield must(room >= held, "eval.in_process_batch_tokens", room, need)


def _rl_checks(config: Sections, ranks: int) -> Checks:
    """Check the rl section, where there is one, against those beside it. `ranks`: of the trainer."""
    if config.rl is not None:
        samples = config.rl.examples_per_step * config.rl.num_samples
        need = f"a product with num_samples={config.rl.num_samples} that {ranks} ranks can share evenly"
        yield must(samples % ranks == 0, "rl.examples_per_step", config.rl.examples_per_step, need)
        if config.rl.agent is not None and config.engine is not None:
            room, need = (
                config.engine.context_length,
                f"at most engine.context_length={config.engine.context_length}",
            )
            tokens = config.rl.agent.tokens_max
            yield must(tokens <= room, "rl.agent.tokens_max", tokens, need)
        tokens, room = config.rl.max_new_tokens, config.data.max_length
        yield must(tokens < room, "rl.max_new_tokens", tokens, f"less than data.max_length={room}")
    if config.rl is not None and "rl" in config.stages and config.target.sharding != "none":
        valued = isinstance(config.rl.baseline, ValueModel)
        need = "a number, 'group_mean' or 'leave_one_out' with target.sharding: a sharded model has no value head"
        yield must(not valued, "rl.baseline", config.rl.baseline, need)
        replayed = not config.uses_engine and bool(config.data.eval_mixture)
        need = "[] with target.sharding where rl.sampling.source is a file: without an engine it answers no questions"
        yield not replayed, f"data.eval_mixture: needs {need}"
