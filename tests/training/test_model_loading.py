"""Models and tokenizers out of directories."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollouts.engines.embedded import served_model as embedded
from rollouts.engines.embedded.served_model import ServedModelError
from rollouts.training.datasets.chat import render_conversation
from rollouts.training.model_loading import ModelError, load_model, load_tokenizer
from rollouts.training.reference import load_reference
from scripts import run_eval
from tests.training import tiny
from tests.training.tiny_task import TINY_MODEL, tiny_model, tiny_tokenizer


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_random_weights_are_a_function_of_the_seed_and_leave_the_rng_alone() -> None:
    """Goal: reproducible, no side effect. Red without fork_rng, and without manual_seed."""
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    first = parameters(tiny_model(seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(parameters(tiny_model(seed=1)), first)
    assert not torch.equal(parameters(tiny_model(seed=2)), first)
    assert first.dtype == torch.float32 and 130_000 < len(first) < 170_000


def test_a_saved_model_loads_with_the_same_weights_in_fp32(tmp_path: Path) -> None:
    """Goal: master weights are float32 though the checkpoint is bfloat16. Red with dtype="auto"."""
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert parameters(loaded).dtype == torch.float32 and loaded.training
    assert torch.equal(parameters(loaded), parameters(model).float())
    assert parameters(load_model(str(tmp_path), dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_tokenizer_survives_a_checkpoint(tmp_path: Path) -> None:
    """Goal: an engine that loads the checkpoint has the same ids, template and end token.

    Red with a tokenizer.json that is not byte-level BPE: transformers rebuilt it for qwen2 and lost the spaces.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(Path(TINY_MODEL) / "config.json", tmp_path)
    again = load_tokenizer(str(tmp_path))
    text = "a b\né #### 1"
    assert (
        again(text)["input_ids"] == tokenizer(text)["input_ids"]
        and again.decode(again(text)["input_ids"]) == text
    )
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
    assert render_conversation(again, turns, "") == render_conversation(tokenizer, turns, "")
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (1, 0, 261)
    assert (
        len(tokenizer) == json.loads((Path(TINY_MODEL) / "config.json").read_text())["vocab_size"]
    )


@pytest.mark.parametrize("load", [load_tokenizer, load_model])
@pytest.mark.parametrize("name", ["/no/such/model", "./no_such", "a/b/c"])
def test_a_missing_directory_is_named(load: object, name: str) -> None:
    """Goal: a path that is not there never goes to the hub. Red when it did (a hub id error)."""
    with pytest.raises(ModelError, match=f"{name}: no such directory"):
        load(name)  # type: ignore[operator]


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    """Goal: what is missing, and the fix. Red when transformers' own message came through."""
    with pytest.raises(ModelError, match=r"lacks config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"lacks weights .*; set init='random'"):
        load_model(TINY_MODEL)
    with pytest.raises(ModelError, match="init='zeros': needs 'pretrained' or 'random'"):
        load_model(TINY_MODEL, init="zeros")  # type: ignore[arg-type]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """Goal: a ModelError with the directory whatever transformers raises. Red without the wrap."""
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of .*/m"):
        load_tokenizer(str(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text('{"model_type": "no_such"}')
    with pytest.raises(ModelError, match=r"cannot load the model of .*/m.*check the files"):
        load_model(str(tmp_path / "m"), init="random")


def saved(
    directory: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    *,
    tied: bool,
) -> str:
    """A tiny model on disk, with its tensors as `change` gives them."""
    tiny.tiny_model(tied=tied).save_pretrained(directory)
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(directory)


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def under(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor[::2].contiguous() if "gate" in name else tensor
        for name, tensor in tensors.items()
    }


INCOMPLETE = [
    (
        under("_orig_mod."),
        True,
        r"no tensor for lm_head.weight, .*the names carry the prefix '_orig_mod\.'",
    ),
    (under("module."), False, r"the names carry the prefix 'module\.'"),
    (under("base_model.model."), False, r"the names carry the prefix 'base_model\.model\.'"),
    (without("layers.1."), False, r"no tensor for model\.layers\.1\..*12 tensors"),
    (without("lm_head"), False, r"no tensor for lm_head\.weight\. They would be random"),
    (without("embed_tokens"), True, r"no tensor for lm_head\.weight, model\.embed_tokens\.weight"),
    (without("norm"), False, "no tensor for .*norm"),
    (
        halved,
        False,
        r"mlp\.gate_proj\.weight has shape \[16, 16\], the architecture needs \[32, 16\]",
    ),
]


def load_embedded(path: str) -> object:
    return embedded.load(path, dtype="float32", device="cpu", trust_remote_code=False)


@pytest.mark.parametrize("load", [load_model, load_reference, load_embedded])
@pytest.mark.parametrize(("change", "tied", "message"), INCOMPLETE)
def test_weights_that_are_missing_are_refused(
    tmp_path: Path,
    load: Callable[[str], object],
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    tied: bool,
    message: str,
) -> None:
    """Goal: no tensor is ever random: an error that names it, wherever models are loaded: to train, as the reference,
    to serve. Red with the report of from_pretrained left in its log: the model came, with other weights each time."""
    with pytest.raises((ModelError, ServedModelError), match=message):
        load(saved(tmp_path / "m", change, tied=tied))


def test_run_eval_refuses_missing_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goal: the script's error line, not the score of random weights. Red with its own call of from_pretrained."""
    path = saved(tmp_path / "m", without("layers.1."), tied=True)
    tiny_tokenizer().save_pretrained(path)
    data = Path(run_eval.__file__).parent.parent / "configs/data/letters/test.jsonl"
    assert run_eval.main([path, "--data", str(data), "--max-samples", "1"]) == 1
    assert "no tensor for model.layers.1." in capsys.readouterr().err


def test_tied_and_unknown_tensors_are_no_reason_to_refuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Goal: one of a tied pair's names is enough; what the model does not have is named. Red with tied ones asked for,
    and (the warning) with the unexpected keys not looked at."""
    for number, change in enumerate(
        (lambda tensors: tensors, lambda tensors: {**tensors, "v_head.weight": torch.ones(2)})
    ):
        loaded = load_model(saved(tmp_path / str(number), change, tied=True))
        assert torch.equal(parameters(loaded), parameters(tiny.tiny_model(tied=True)))
    assert [
        record.getMessage()
        for record in caplog.records
        if record.name == "rollouts.training.model_loading"
    ] == [f"{tmp_path / '1'}: its files hold tensors that the model lacks: v_head.weight"]


def test_an_adapter_alone_is_named(tmp_path: Path) -> None:
    """Goal: the fix, which is to merge it. Red without the check: no file named model.safetensors."""
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.ones(1)}, tmp_path / "m" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"holds an adapter .* merge it into its base model"):
        load_model(str(tmp_path / "m"))


def test_a_pickle_in_place_of_weights_is_not_run(tmp_path: Path) -> None:
    """Goal: an older checkpoint's pytorch_model.bin is data. Red with weights_only=False: the file is written."""
    tiny.tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Attack:
        def __reduce__(self) -> object:
            return os.system, (f"touch {tmp_path}/attacked",)

    torch.save({"model.embed_tokens.weight": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(str(tmp_path))
    assert not (tmp_path / "attacked").exists()


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """Goal: a model whose tokenizer files were not copied says so. Red without the check: transformers makes up a
    tokenizer of one token, and the run ended at its first row, with advice about the chat template."""
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    for file in (tmp_path / "m").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        ModelError, match=r"/m: its tokenizer lacks a vocabulary: there is no tokenizer\.json"
    ):
        load_tokenizer(str(tmp_path / "m"))


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    """Goal: nothing would ever stop. Red without the check."""
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    # of no default end token of its own
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gpt_neox"}')
    file = tmp_path / "m" / "tokenizer_config.json"
    changes = {"eos_token": None, "tokenizer_class": "TokenizersBackend"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelError, match="lacks an eos_token"):
        load_tokenizer(str(tmp_path / "m"))
