"""Checks of the model and its adapters."""

from rollouts.config.checks.needs import Checks, at_least_one, matches, must, seed_check
from rollouts.config.schema import ModelConfig


def model_checks(model: ModelConfig) -> Checks:
    yield must(bool(model.name.strip()), "model.name", model.name, "a hub id or a directory")
    yield seed_check(model.init_seed, "model.init_seed")
    lora = model.lora
    if lora is not None:
        yield from at_least_one(lora, "model.lora", "rank")
        yield must(lora.alpha > 0, "model.lora.alpha", lora.alpha, "> 0; twice the rank is common")
        yield must(0 <= lora.dropout < 1, "model.lora.dropout", lora.dropout, "0 <= dropout < 1")
        names = lora.target_modules
        names_ok = names == "all-linear" or (
            len(names) > 0 and all(matches(r"[\w.]+", name) for name in names)
        )
        yield must(
            names_ok, "model.lora.target_modules", names, "names of linear layers, or 'all-linear'"
        )
        yield seed_check(lora.init_seed, "model.lora.init_seed")
