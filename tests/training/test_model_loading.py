"""Models and tokenizers out of directories."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rollouts.training.datasets.chat import render_conversation
from rollouts.training.model_loading import ModelError, load_model, load_tokenizer
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
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.decode(again(text)["input_ids"]) == text
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
    assert render_conversation(again, turns, "") == render_conversation(tokenizer, turns, "")
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (1, 0, 261)
    assert len(tokenizer) == json.loads((Path(TINY_MODEL) / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("load", [load_tokenizer, load_model])
@pytest.mark.parametrize("name", ["/no/such/model", "./no_such", "a/b/c"])
def test_a_missing_directory_is_named(load: object, name: str) -> None:
    """Goal: a path that is not there never goes to the hub. Red when it did (a hub id error)."""
    with pytest.raises(ModelError, match=f"{name}: no such directory"):
        load(name)  # type: ignore[operator]


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    """Goal: what is missing, and the fix. Red when transformers' own message came through."""
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"holds no weights .*; set init='random'"):
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


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    """Goal: nothing would ever stop. Red without the check."""
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gpt_neox"}')  # of no default end token of its own
    file = tmp_path / "m" / "tokenizer_config.json"
    changes = {"eos_token": None, "tokenizer_class": "TokenizersBackend"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelError, match="has no eos_token"):
        load_tokenizer(str(tmp_path / "m"))
