"""`--set`: other values for a config's fields, several of them a sweep."""

from typing import Any

import pytest

from rollouts.config.field_types import ConfigError
from rollouts.config.overrides import variants
from rollouts.config.schema import KLConfig, TensorBoard, Wandb
from tests.example_config import example_config


def test_a_sweep_is_every_combination() -> None:
    """Goal: two settings of two and three values are six runs, each a whole config, whose names say what differs.
    Red with the settings taken in step."""
    found = variants(example_config(), ["rl.matrix_lr=1e-6,3e-6", "rl.sampling.seed=0,1,2"])
    assert [
        (run.config.rl.matrix_lr, run.config.rl.sampling.seed) for run in found if run.config.rl
    ] == [(rate, seed) for rate in (1e-6, 3e-6) for seed in (0, 1, 2)]
    assert found[0].label == "matrix_lr-1e-06_seed-0" and len({run.label for run in found}) == 6
    assert found[5].values == {"rl.matrix_lr": 3e-6, "rl.sampling.seed": 2}


def test_one_value_is_not_part_of_the_name() -> None:
    """Goal: what all runs have in common is not in their names. Red with every setting in the label."""
    assert variants(example_config(), [])[0].config == example_config()
    (one,) = variants(example_config(), ["rl.matrix_lr=1e-6"])
    assert one.label == "" and one.config.rl is not None and one.config.rl.matrix_lr == 1e-6
    assert [
        run.label
        for run in variants(example_config(), ["rl.matrix_lr=1e-6", "log_level=INFO,DEBUG"])
    ] == [
        "log_level-INFO",
        "log_level-DEBUG",
    ]


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("rl.matrix_lr=1", "rl.matrix_lr", 1.0),
        ("rl.baseline=leave_one_out", "rl.baseline", "leave_one_out"),
        ("rl.baseline=0.5", "rl.baseline", 0.5),
        ("model.name=some/Model-0.5B", "model.name", "some/Model-0.5B"),
        ("experiment_name=7", "output.experiment_name", "7"),
        ("model.compile=True", "model.compile", True),
        ("target.gpu_ranks=[0,1]", "target.gpu_ranks", [0, 1]),
        ("rl.kl=None", "rl.kl", None),
        (
            'rl.kl=KLConfig(coef=0.1, kind="k3", reference=None)',
            "rl.kl",
            KLConfig(coef=0.1, kind="k3", reference=None),
        ),
        (
            "output.trackers=[Wandb(project='p', offline=True), TensorBoard(project='p', directory=None)]",
            "output.trackers",
            [Wandb(project="p", offline=True), TensorBoard(project="p", directory=None)],
        ),
        ("output.on_end=echo TensorBoard(", "output.on_end", "echo TensorBoard("),
        ("data.rl_mixture.0.max_samples=10", "data.rl_mixture.0.max_samples", 10),
        ("over_sampling_factor=2", "rl.sampling.over_sampling_factor", 2.0),
        ("data.eval_mixture=[]", "data.eval_mixture", []),
    ],
)
def test_values_as_one_writes_them(setting: str, path: str, value: Any) -> None:
    """Goal: numbers, texts with or without quotes, lists, None and groups are read by the field's type. Red with every
    value taken as text."""
    (run,) = variants(example_config(), [setting])
    assert run.values == {path: value} and type(run.values[path]) is type(value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("rl.matrx_lr=1", "has no field 'rl.matrx_lr'; did you mean 'rl.matrix_lr'?"),
        ("rl.seed=1", "has no field 'rl.seed'; did you mean 'rl.sampling.seed'?"),
        ("matrix_lr=1", "may be sft.matrix_lr or rl.matrix_lr: name one"),
        ("rl.matrix_lr", "needs field=value"),
        ("=3", "needs field=value"),
        ("rl.matrix_lr=fast", "rl.matrix_lr='fast': needs float"),
        ("rl.num_samples=4.5", "rl.num_samples=4.5: needs int"),
        ("model.dtype=float16", "needs one of 'float32', 'bfloat16'"),
        ("rl.kl=KLConfig(coef=0.1)", "KLConfig needs 'kind', 'reference': no field has a default"),
        ("rl.kl=KLConfig(coef=open('x'))", "needs plain values"),
        ("data.rl_mixture.7.start=1", "has no field 'data.rl_mixture.7.start'"),
        ("rl.matrix_lr=", "rl.matrix_lr='': needs float"),
        ("rl.kl=KLConfig(0.1, kind='k3', reference=None)", "takes its fields by name"),
        (
            "output.trackers=tensorboard",
            "write [TensorBoard(project=…, directory=…)], all of it in",
        ),
        ("output.trackers=['wandb']", "write [Wandb(project=…, offline=…)]"),
        ('output.trackers=[{"kind": "mlflow"}]', "write [Mlflow(project=…, tracking_uri=…)]"),
        ("output.trackers=[Wandb(project='p')]", "Wandb needs 'offline': no field has a default"),
        ("output.trackers=[Wandb(project='p']", "'('"),
        ("rl.kl=0.1", "write KLConfig(coef=…, kind=…, reference=…)"),
        ("rl.temperature=" + "-" * 100_000 + "1", "has 100016 characters; 4000 at most"),
    ],
)
def test_settings_that_are_wrong(setting: str, says: str) -> None:
    """Goal: each is an error that names the setting, the nearest field and what is allowed; nothing of it is executed.
    Red with the value passed on unchecked."""
    with pytest.raises(ConfigError) as error:
        variants(example_config(), [setting])
    assert says in str(error.value) and f"--set {setting.split('KLConfig', maxsplit=1)[0]}"[
        :12
    ] in str(error.value)


def test_all_mistakes_at_once() -> None:
    """Goal: every wrong setting is named, one that stands twice too. Red with the first alone."""
    with pytest.raises(ConfigError) as error:
        variants(example_config(), ["rl.num_samples=x", "rl.top=1", "rl.top_k=1", "rl.top_k=2"])
    assert len(str(error.value).splitlines()) == 3
