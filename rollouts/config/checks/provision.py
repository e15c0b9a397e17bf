"""Checks of the machine to rent."""

import re

from rollouts.config.checks.needs import Checks, at_least_one, must
from rollouts.config.schema import ProvisionConfig


def provision_checks(provision: ProvisionConfig) -> Checks:
    providers = provision.providers
    each_once = len(providers) >= 1 and len(set(providers)) == len(providers)
    yield must(each_once, "provision.providers", providers, "at least one provider, each once")
    for name in ("gpu_types", "regions"):
        parts = getattr(provision, name)
        yield must(
            all(part.strip() for part in parts),
            f"provision.{name}",
            parts,
            "parts of names, none of them empty",
        )
    named = bool(provision.gpu_types) or provision.gpu_memory_gb_min > 0
    yield must(
        named, "provision.gpu_types", provision.gpu_types, "a name, or gpu_memory_gb_min > 0"
    )
    yield must(
        provision.gpu_memory_gb_min >= 0,
        "provision.gpu_memory_gb_min",
        provision.gpu_memory_gb_min,
        ">= 0",
    )
    yield from at_least_one(provision, "provision", "gpus", "disk_gib")
    image = provision.image
    yield must(
        image is None or bool(image.strip()),
        "provision.image",
        image,
        "the name of an image, or None",
    )
    for name in ("price_per_hour_max", "hours_max", "spend_max", "ready_timeout_s"):
        yield must(
            getattr(provision, name) > 0, f"provision.{name}", getattr(provision, name), "> 0"
        )
    idle = provision.idle_minutes_max
    yield must(idle is None or idle > 0, "provision.idle_minutes_max", idle, "> 0, or None")
    guard = provision.guard_host
    is_target = guard is None or re.fullmatch(r"[^\s-]\S*", guard) is not None
    yield must(is_target, "provision.guard_host", guard, "[USER@]HOST[:PORT], or None")
    for name in ("retries_max", "resumes_max"):
        yield must(
            getattr(provision, name) >= 0, f"provision.{name}", getattr(provision, name), ">= 0"
        )
