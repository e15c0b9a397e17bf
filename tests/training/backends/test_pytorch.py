"""The PyTorch backend: futures in order, failures that stay, accumulation that adds up, schedules and clipping."""

import functools
import math
import threading

import anyio
import pytest
import torch

from rollouts.training.backends import BackendFailedError, create_pytorch_backend
from rollouts.training.loops.batching import collate, split_batch
from rollouts.training.loops.rl_loop import prepare_grpo_batch
from rollouts.training.loops.train_step import train_step
from rollouts.training.rl_losses import grpo_loss, ppo_loss, sft_loss
from rollouts.training.types import RLTrainingConfig
from tests.training.tiny import (
    PAD,
    VOCAB,
    rollout_batch,
    sft_samples,
    tiny_backend,
    tiny_model,
    tiny_tokenizer,
)

ASYNC = pytest.mark.parametrize("runtime", ["asyncio", "trio"])


def sft_batch(count: int = 8, seed: int = 0) -> dict:
    samples = sft_samples(count, seed)
    return collate([s.tokens for s in samples], [s.loss_mask for s in samples], pad_token_id=PAD)


def rl_batch(seed: int = 0, **options) -> dict:
    rollouts = rollout_batch(4, 2, seed)
    return prepare_grpo_batch(
        rollouts, rollouts.rewards, RLTrainingConfig(num_steps=1, baseline=0.5), **options
    )


@ASYNC
def test_futures_apply_in_order_with_several_in_flight(tmp_path, runtime):
    """Goal: two steps submitted before any is awaited equal two awaited ones. Red with a pool of two threads."""

    async def pipelined():
        backend = tiny_backend(tmp_path)
        futures = []
        for seed in range(4):
            futures += [backend.forward_backward(sft_batch(seed=seed)), backend.optim_step()]
        return [await future.result() for future in futures]

    async def awaited():
        backend = tiny_backend(tmp_path)
        results = []
        for seed in range(4):
            results.append(await backend.forward_backward(sft_batch(seed=seed)).result())
            results.append(await backend.optim_step().result())
        return results

    results = anyio.run(pipelined, backend=runtime)
    assert results == anyio.run(awaited, backend=runtime)
    assert [result["step"] for result in results[1::2]] == [1, 2, 3, 4]
    assert {"loss", "grad_norm"} <= set(results[0])
    assert {"lr", "step", "grad_norm"} <= set(results[1])


@ASYNC
def test_an_error_surfaces_at_result_and_the_backend_refuses_more(tmp_path, runtime):
    """Goal: no step is taken on half a gradient. Red with the failure not kept: the second step is applied."""

    async def main():
        backend = tiny_backend(tmp_path)
        before = [parameter.clone() for parameter in backend.model.parameters()]
        good = sft_batch()
        futures = [
            backend.forward_backward(good),
            backend.forward_backward({"input_ids": good["input_ids"]}),
        ]
        update = backend.optim_step()
        assert (await futures[0].result())["loss"] > 0
        with pytest.raises(
            ValueError, match="batch has no labels, loss_mask: needed by the model and sft_loss"
        ):
            await futures[1].result()
        with pytest.raises(
            BackendFailedError, match="optim_step refused: forward_backward of this PyTorch"
        ) as caught:
            await update.result()
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(BackendFailedError, match="save_checkpoint refused"):
            await backend.save_checkpoint(1, {})
        assert all(
            torch.equal(a, b) for a, b in zip(before, backend.model.parameters(), strict=True)
        )

    anyio.run(main, backend=runtime)


@ASYNC
def test_cancelling_a_wait_leaves_the_work_running(tmp_path, runtime):
    """Goal: a time-out around result() does not undo or repeat work. Red with abandon_on_cancel=False: no time-out."""

    async def main():
        release = threading.Event()

        def slow_loss(logits, labels, loss_mask):
            release.wait(200)
            return sft_loss(logits, labels, loss_mask)

        backend = tiny_backend(tmp_path, loss_fn=slow_loss)
        future = backend.forward_backward(sft_batch())
        with anyio.move_on_after(0.05) as scope:
            await future.result()
        release.set()
        assert scope.cancelled_caught
        assert (await future.result())["loss"] > 0
        assert (await backend.optim_step().result())["step"] == 1

    anyio.run(main, backend=runtime)


@pytest.mark.parametrize("kind", ["sft", "grpo", "ppo"])
def test_accumulation_does_not_change_the_step(tmp_path, kind):
    """Goal: 1x8, 2x4 and 8x1 give one result, in float64 to 1e-12 (open-instruct#1161, ms-swift#10117).

    Red with a mean per micro-batch, and with the sum divided by the number of micro-batches.
    """

    def run(micro_batch_size: int) -> tuple[list[dict], list[torch.Tensor]]:
        loss_fn = {"sft": sft_loss, "grpo": grpo_loss, "ppo": ppo_loss}[kind]
        backend = tiny_backend(tmp_path, loss_fn=loss_fn, dtype=torch.float64, max_grad_norm=0.5)
        batches = [
            sft_batch(seed=seed) if kind == "sft" else rl_batch(seed, temperature=0.9)
            for seed in range(3)
        ]

        async def main():
            return [await train_step(backend, batch, micro_batch_size) for batch in batches]

        return anyio.run(main), [parameter.detach() for parameter in backend.model.parameters()]

    whole_metrics, whole = run(8)
    for size in (4, 1, 3):
        metrics, parameters = run(size)
        for one, other in zip(whole_metrics, metrics, strict=True):
            assert one == pytest.approx(other, rel=1e-12, abs=1e-12)
        for a, b in zip(whole, parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_step_is_plain_torch(tmp_path):
    """Goal: forward_backward and optim_step are what the same lines of torch do. Red with zero_grad left out."""
    backend = tiny_backend(tmp_path, max_grad_norm=0.1)
    model = tiny_model()
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in backend.model.named_parameters()}
    groups = [
        {
            "params": [named[names[id(p)]] for p in g["params"]],
            "lr": g["lr"],
            "weight_decay": g["weight_decay"],
        }
        for g in backend.optimizer.param_groups
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        batch = sft_batch(seed=seed)

        async def step(batch=batch):
            return await train_step(backend, batch, None)

        metrics = anyio.run(step)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = sft_loss(logits, batch["labels"], batch["loss_mask"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for a, b in zip(model.parameters(), backend.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_padding_side_does_not_matter(tmp_path):
    """Goal: positions follow the mask on either side (trl#2708). Red with position_ids left to the model.

    They are looked at as such: rotary embeddings see only differences, so this model's loss would not tell.
    """
    lengths = [len(sample.tokens) for sample in sft_samples(4)]
    right = sft_batch(4)
    width = right["input_ids"].shape[1]
    left = {"tokens_global": right["tokens_global"]}
    for key in ("input_ids", "labels", "attention_mask", "loss_mask"):
        rows = zip(right[key], lengths, strict=True)
        left[key] = torch.stack([torch.roll(row, width - length) for row, length in rows])

    async def loss(batch):
        def plain(logits, labels, loss_mask, tokens_global):  # any other loss than ours runs padded
            seen.append(logits.shape)
            return sft_loss(logits, labels, loss_mask, tokens_global=tokens_global)

        seen = []
        backend = tiny_backend(tmp_path, dtype=torch.float64, loss_fn=plain)
        backend.model.register_forward_pre_hook(
            lambda m, a, given: seen.append(given["position_ids"]), with_kwargs=True
        )
        result = await backend.forward(batch).result()
        for positions, mask, length in zip(seen[0], batch["attention_mask"], lengths, strict=True):
            assert positions[mask == 1].tolist() == list(range(length))
        assert seen[1] == (*batch["input_ids"].shape, VOCAB)
        packed = await tiny_backend(tmp_path, dtype=torch.float64).forward(batch).result()
        assert packed["loss"] == pytest.approx(result["loss"], abs=1e-12)
        return result["loss"]

    assert anyio.run(loss, left) == pytest.approx(anyio.run(loss, right), abs=1e-12)


def test_lr_schedule_and_clipping_are_applied(tmp_path):
    """Goal: every group follows the schedule by its own rate. Red with the factor multiplied into the last rate."""
    backend = tiny_backend(tmp_path, lr=0.1, lr_schedule=lambda step: (0.5, 1.0, 0.0)[step])

    async def main():
        rates = []
        for seed in range(3):
            before = [parameter.clone() for parameter in backend.model.parameters()]
            metrics = await train_step(backend, sft_batch(seed=seed), None)
            rates.append((metrics["lr"], [group["lr"] for group in backend.optimizer.param_groups]))
        assert all(
            torch.equal(a, b) for a, b in zip(before, backend.model.parameters(), strict=True)
        )
        return rates

    assert anyio.run(main) == [
        (0.05, [0.05, 0.025, 0.05]),
        (0.1, [0.1, 0.05, 0.1]),
        (0.0, [0.0, 0.0, 0.0]),
    ]


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path):
    """Goal: one bad step does not destroy the weights. Red with the check off: every parameter turns NaN."""

    def broken(logits, labels, loss_mask):
        return sft_loss(logits, labels, loss_mask) * math.nan

    backend = tiny_backend(tmp_path, loss_fn=broken, max_grad_norm=1.0)

    async def main():
        with pytest.raises(
            FloatingPointError, match=r"grad_norm=nan at step 1 \(loss=nan\): not applied"
        ):
            await train_step(backend, sft_batch(), None)

    anyio.run(main)
    assert all(torch.isfinite(parameter).all() for parameter in backend.model.parameters())


def test_a_step_without_a_gradient_is_an_error(tmp_path):
    """Goal: optim_step twice is noticed. Red with the check off: Adam's momentum moves the weights again."""
    backend = tiny_backend(tmp_path)

    async def main():
        await train_step(backend, sft_batch(), None)
        with pytest.raises(ValueError, match="no forward_backward since the last one"):
            await backend.optim_step().result()

    anyio.run(main)


def test_a_loss_gets_what_its_signature_names(tmp_path):
    """Goal: any function of logits and batch keys is a loss. Red with the whole batch passed: unexpected keywords."""
    seen = {}

    def own_loss(logits, labels, loss_mask, advantages, *, temperature, extra_weight=2.0):
        seen.update(temperature=temperature, extra_weight=extra_weight)
        return grpo_loss(logits, labels, loss_mask, advantages, temperature=temperature)

    async def loss(loss_fn, batch):
        return (await tiny_backend(tmp_path, loss_fn=loss_fn).forward(batch).result())["loss"]

    batch = rl_batch(temperature=0.7)
    own = anyio.run(loss, own_loss, batch)
    assert seen == {"temperature": 0.7, "extra_weight": 2.0}
    assert own == pytest.approx(
        anyio.run(loss, functools.partial(grpo_loss, tokens_global=None), batch), rel=1e-6
    )
    del batch["old_log_probs"]
    with pytest.raises(
        ValueError, match="batch has no old_log_probs: needed by the model and ppo_loss"
    ):
        anyio.run(loss, ppo_loss, batch)


def test_bfloat16_compute_keeps_float32_weights_and_state(tmp_path):
    """Goal: fp32 master weights, state and log-probs under autocast (AReaL#1292). Red with the model cast to bf16."""
    rough, exact = tiny_backend(tmp_path, compute_dtype="bfloat16"), tiny_backend(tmp_path)
    seen = {}
    rough.model.model.layers[0].mlp.register_forward_hook(
        lambda *hook: seen.update(hidden=hook[2].dtype)
    )

    async def main():
        return [
            (await train_step(backend, sft_batch(), None))["loss"] for backend in (rough, exact)
        ]

    losses = anyio.run(main)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]
    assert seen["hidden"] is torch.bfloat16
    assert {p.dtype for p in rough.model.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in rough.optimizer.state.values()} == {torch.float32}


def test_forward_is_without_gradient_or_dropout(tmp_path):
    """Goal: validation leaves no trace. Red without eval(): two passes differ; without no_grad: a graph is kept."""
    tracked = []

    def loss_fn(logits, labels, loss_mask):
        tracked.append(logits.requires_grad)
        return sft_loss(logits, labels, loss_mask)

    backend = tiny_backend(tmp_path, loss_fn=loss_fn)
    for layer in backend.model.model.layers:
        layer.self_attn.attention_dropout = 0.5

    async def main():
        return [await backend.forward(sft_batch()).result() for _ in range(2)]

    first, second = anyio.run(main)
    assert first == second
    assert first["tokens"] == sft_batch()["tokens_global"]
    assert backend.model.training
    assert tracked == [False, False]


def test_split_batch_deals_every_row_once_and_trims():
    """Goal: ranks and micro-batches cover the batch, evenly and without needless padding. Red with rank ignored."""
    batch = sft_batch(11)
    rows = []
    for rank in range(3):
        for micro in split_batch(batch, rank=rank, world_size=3, micro_batch_size=2):
            lengths = micro["attention_mask"].sum(1)
            assert micro["input_ids"].shape == (len(lengths), int(lengths.max()))
            assert len(lengths) <= 2
            assert micro["tokens_global"] == batch["tokens_global"]
            for ids, mask, length in zip(
                micro["input_ids"], micro["loss_mask"], lengths, strict=True
            ):
                rows.append((ids[:length].tolist(), mask[:length].tolist()))
    expected = [(s.tokens, s.loss_mask) for s in sft_samples(11)]
    assert sorted(rows) == sorted(expected)
    assert len(list(split_batch(sft_batch(1), rank=1, world_size=2, micro_batch_size=None))) == 0


def test_collate_keeps_a_real_token_that_equals_the_padding():
    """Goal: pad == eos masks no real EOS (trl#3091). Red with attention_mask = input_ids != pad_token_id."""
    batch = collate(
        [[5, PAD], [5, 6, 7, PAD]], [[0.0, 1.0], [0.0, 1.0, 1.0, 1.0]], pad_token_id=PAD
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["loss_mask"].tolist() == [[0, 1, 0, 0], [0, 1, 1, 1]]
    assert batch["tokens_global"] == 4


def test_factory_makes_a_trainable_backend(tmp_path):
    """Goal: the documented call, on a local directory, in float32 with the tokenizer. Red with the dtype left out."""
    directory = tmp_path / "model"
    tiny_model(dtype=torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    backend = create_pytorch_backend(
        model_name=directory,
        checkpoint_dir=tmp_path / "sft",
        device_type="cpu",
        learning_rate=1e-3,
        embedding_lr=2e-3,
    )
    assert {parameter.dtype for parameter in backend.model.parameters()} == {torch.float32}
    assert [group["lr"] for group in backend.optimizer.param_groups] == [1e-3, 2e-3, 1e-3]

    async def main():
        await train_step(backend, sft_batch(), None)
        return await backend.save_checkpoint(1, {"loss": 1.0})

    path = anyio.run(main)
    again = create_pytorch_backend(path, tmp_path, device_type="cpu")
    assert again._saver.tokenizer.get_vocab() == backend._saver.tokenizer.get_vocab()
    assert backend.model.config.vocab_size == VOCAB


def test_factory_draws_weights_from_a_seed_of_its_own(tmp_path):
    """Goal: init_seed decides the weights, and the global generator is left alone. Red without fork_rng."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def weights(seed: int) -> torch.Tensor:
        backend = create_pytorch_backend(tmp_path / "model", tmp_path, "cpu", init_seed=seed)
        return backend.model.model.embed_tokens.weight.detach()

    state = torch.get_rng_state()
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "float16"}, "compute_dtype='float16': needs 'float32' or 'bfloat16'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: needs > 0, or math.inf"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    """Goal: a wrong option fails when the backend is made. Red with the checks off."""
    with pytest.raises(ValueError, match=message):
        tiny_backend(tmp_path, **options)


def test_a_device_that_is_not_there(tmp_path):
    """Goal: the message names what this machine has. Red with torch.device() alone: an error at the first step."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(
        ValueError, match="device_type='cuda': not usable here; this machine has 'cpu'"
    ):
        create_pytorch_backend("anything", tmp_path)
