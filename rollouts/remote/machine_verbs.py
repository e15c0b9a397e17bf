"""The verbs about rented machines: what clouds offer, which are ours, and their guard."""

from typing import Annotated, Any

import typer

from rollouts.remote import completion
from rollouts.remote.app import Json, Settings, verb
from rollouts.view.screen import Screen


@verb("offers")
def offers(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="Ask by its provision section."),
    ] = None,
    *,
    settings: Settings = None,
    gpu: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A part of its name; several: any.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="GPUs of the machine.")] = 1,
    vram: Annotated[
        float | None, typer.Option(min=1, metavar="GB", help="Memory of each GPU, at least.")
    ] = None,
    max_price: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="An hour, for the machine.")
    ] = None,
    region: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A part of its name; several: any.")
    ] = None,
    spot: Annotated[
        bool, typer.Option("--spot", help="Spot machines too, which may be taken away.")
    ] = False,
    disk: Annotated[
        int, typer.Option(min=1, metavar="GIB", help="Disk that the price is to hold.")
    ] = 50,
    as_json: Json = False,
) -> Any:
    """List what RunPod, Vast, Lambda and Prime Intellect would rent out, the cheapest first."""
    from rollouts.cloud.machine_types import MachineNeeds
    from rollouts.remote import cloud_verbs

    if config is not None:
        asked = (gpu, vram, max_price, region, spot or None, count != 1 or None, disk != 50 or None)
        if any(option is not None for option in asked):
            raise typer.BadParameter("CONFIG says all that is asked for; --set changes it.")
        return cloud_verbs.offers_for(config, settings or ())
    if settings:
        raise typer.BadParameter("--set changes a CONFIG, and none is named.")
    return cloud_verbs.offers(
        MachineNeeds(
            gpu_types=tuple(gpu or ()),
            gpus=count,
            vram_gb_min=vram,
            price_per_hour_max=max_price,
            regions=tuple(region or ()),
            spot=spot,
            disk_gib=disk,
        )
    )


@verb("machines")
def machines(
    action: Annotated[
        str | None,
        typer.Argument(
            metavar="[end]",
            help="End a machine; without it, list all.",
            autocompletion=lambda: ["end"],
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Argument(
            metavar="[MACHINE]", help="Its name.", autocompletion=completion.machine_names
        ),
    ] = None,
    *,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="End all that were rented here and bill.")
    ] = False,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="End one that was rented from elsewhere, or with another key."),
    ] = False,
    as_json: Json = False,
) -> Any:
    """List the machines that were rented from clouds, or end some of them."""
    from rollouts.remote import cloud_verbs

    if action not in (None, "end"):
        raise typer.BadParameter(f"{action!r}: only `end` can be done to a machine.")
    if action is None:
        return cloud_verbs.machines()
    return cloud_verbs.end_machines(machine, orphans=orphans, yes=yes)


@verb("guard")
def guard(
    *,
    stay: Annotated[
        bool, typer.Option("--stay", help="For good, and for other computers too.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """End each rented machine at its limits; returns when none is left. A deploy starts it by itself."""
    from rollouts.remote import cloud_verbs

    return cloud_verbs.guard(Screen(as_json=as_json).remark, stay=stay)
