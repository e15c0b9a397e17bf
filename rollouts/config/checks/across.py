"""Checks that no section can make alone."""

from rollouts.config.answer_limits import answer_limits, row_tokens_max
from rollouts.config.checks.engine import engine_fits, weight_sync_checks
from rollouts.config.checks.needs import Checks, must
from rollouts.config.checks.stage_checks import rate_checks
from rollouts.config.schema import Sections, ValueModel


def cross_checks(config: Sections) -> Checks:
    """Check what no group can see alone. Runs only when every type is right."""
    mode, ranks, data = config.output.mode, max(1, config.target.world_size), config.data
    for name in config.stages:
        yield getattr(config, name) is not None, f"{name}=None: output.mode={mode!r} has this stage, which needs it"
        mixture = f"{name}_mixture"
        if name == "sft" or config.uses_engine:
            yield bool(getattr(data, mixture)), f"data.{mixture}=[]: empty, and output.mode={mode!r} trains on it"
        stage = getattr(config, name)
        if stage is not None and stage.eval_every != -1:
            need = "-1, or rows in data.eval_mixture, which is empty"
            yield must(bool(data.eval_mixture), f"{name}.eval_every", stage.eval_every, need)
    one = config.provision is None or config.target.hosts == 1
    yield must(one, "target.hosts", config.target.hosts, "1, or provision=None: one machine is rented")
    yield from _answer_checks(config)
    if config.rl is not None and "rl" in config.stages and config.rl.eval_every != -1 and data.eval_mixture:
        need = "-1, or rows with prompts in data.eval_mixture, which has plain text alone"
        asked = any(spec.format != "text" for spec in data.eval_mixture)
        yield must(asked, "rl.eval_every", config.rl.eval_every, need)
    if config.uses_engine:
        yield config.engine is not None, f"engine=None: output.mode={mode!r} has an rl stage, which samples from it"
        if config.engine is not None:
            yield from engine_fits(config, config.engine)
            yield from weight_sync_checks(config, config.engine)
    if config.sft is not None and config.sft.batch_size >= 1 and config.sft.micro_batch_tokens == -1:
        target, per_pass = config.sft.target_examples_per_step, config.sft.batch_size * ranks
        need = f"a multiple of batch_size x ranks = {config.sft.batch_size} x {ranks}"
        yield must(target % per_pass == 0, "sft.target_examples_per_step", target, need)
    if config.rl is not None:
        samples = config.rl.examples_per_step * config.rl.num_samples
        need = f"a product with num_samples={config.rl.num_samples} that {ranks} ranks can share evenly"
        yield must(samples % ranks == 0, "rl.examples_per_step", config.rl.examples_per_step, need)
        if config.rl.agent is not None and config.engine is not None:
            room, need = config.engine.context_length, f"at most engine.context_length={config.engine.context_length}"
            tokens = config.rl.agent.tokens_max
            yield must(tokens <= room, "rl.agent.tokens_max", tokens, need)
        need = f"less than data.max_length={data.max_length}"
        yield must(config.rl.max_new_tokens < data.max_length, "rl.max_new_tokens", config.rl.max_new_tokens, need)
    if config.rl is not None and "rl" in config.stages and config.target.sharding != "none":
        valued = isinstance(config.rl.baseline, ValueModel)
        need = "a number, 'group_mean' or 'leave_one_out' with target.sharding: a sharded model has no value head"
        yield must(not valued, "rl.baseline", config.rl.baseline, need)
        replayed = not config.uses_engine and bool(data.eval_mixture)
        need = "[] with target.sharding where rl.sampling.source is a file: without an engine it answers no questions"
        yield not replayed, f"data.eval_mixture: needs {need}"
    for name in config.stages:
        if getattr(config, name) is not None:
            yield from rate_checks(config, name)
    starts_rl = mode == "rl" and config.uses_engine and config.output.source_checkpoint is None
    noise = config.model.init == "random" and starts_rl
    yield not noise, "model.init='random': output.mode='rl' would sample from noise; use 'sft+rl' or source_checkpoint"


def _answer_checks(config: Sections) -> Checks:
    """Check answers in process: what is held at once is a limit only if one row stays within it."""
    if any(answer_limits(config, stage) for stage in config.stages):
        room, held = config.eval.in_process_batch_tokens, row_tokens_max(config)
        need = f">= {held}: as many tokens as one row's answers may hold at once (data.max_length, eval.num_samples)"
        yield must(room >= held, "eval.in_process_batch_tokens", room, need)
