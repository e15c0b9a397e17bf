"""The shipped plain-text config over a small local directory of its data set's name."""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from base_config import load_config
from rollouts.training.datasets.dataset_loaders import load_examples, load_sft_mixture
from tests.training.datasets.hub import write_parquet
from tests.training.tiny_task import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def test_training_and_held_out_documents_are_one_stream_cut_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: no document is trained on and evaluated; both are streamed. Red with another shuffle_seed for one."""
    data = load_config(ROOT / "configs" / "sft_openwebtext.py").data
    documents = [{"text": f"document {n} " + "word " * n} for n in range(60)]
    write_parquet(tmp_path / data.sft_mixture[0].name / "plain_text", "train", documents, shards=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (held_out,), (trained,) = data.eval_mixture, data.sft_mixture
    assert held_out.stop == trained.start == 500 and trained.stop == 20_500
    held_out, trained = replace(held_out, stop=10), replace(trained, start=10, stop=60)
    texts = [{example.text for example in load_examples(spec)} for spec in (held_out, trained)]
    assert [len(own) for own in texts] == [10, 50] and not texts[0] & texts[1]
    assert not list(tmp_path.rglob("*.arrow"))

    samples, report = load_sft_mixture(
        [trained], tokenizer=tiny_tokenizer(), max_length=64, seed=data.shuffle_seed
    )
    assert report.left_out == {} and report.texts_split > 10 and report.kept == len(samples) > 100
    assert all(len(sample.tokens) <= 64 and not sample.loss_mask[0] for sample in samples)
    assert report.trained_tokens == report.total_tokens - len(samples)
