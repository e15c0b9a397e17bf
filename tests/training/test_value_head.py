"""PPO's value model: where values are read, what is learned from them, and that no cut of a step changes it."""

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch

from rollouts.training import forward
from rollouts.training.checkpoint import CheckpointError
from rollouts.training.log_probs import TokenLogProbs
from rollouts.training.loops import prepare_grpo_batch, run_rl_training
from rollouts.training.loops.batching import split_batch
from rollouts.training.loops.value_step import add_value_advantages
from rollouts.training.loss_terms import value_loss
from rollouts.training.rl_losses import policy_loss
from rollouts.training.types import RLTrainingConfig, RolloutBatch, Sample
from rollouts.training.value_head import ValueHead
from tests.training.loops.test_rl_loop import CountingBuffer, PolicyEngine
from tests.training.tiny import PAD, VOCAB, rollout_batch, tiny_backend, tiny_model

WIDTH = 16  # of the tiny model's hidden states
CRITIC = {"baseline": "value", "gamma": 0.9, "gae_lambda": 0.8}


def head(seed: int | None = None, lr: float = 1e-2) -> ValueHead:
    made = ValueHead(WIDTH, lr=lr)
    if seed is not None:
        with torch.no_grad():
            made.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))
            made.bias.fill_(0.3)
    return made


def backend_with(
    directory: Path, value_head: ValueHead | None, *, seed: int = 0, **loss: Any
) -> Any:
    loss_fn = partial(
        policy_loss, **{"loss": "ppo", "value_coef": 0.5 if value_head else 0.0, **loss}
    )
    return tiny_backend(directory, loss_fn=loss_fn, value_head=value_head, seed=seed)


class Rollouts:
    """The same made-up groups for the same step; the replay of a run, as the loop sees it."""

    def __init__(self) -> None:
        self.step = 0

    async def generate_batch(self, reward_fn: Any = None) -> RolloutBatch:
        self.step += 1
        return rollout_batch(3, 3, seed=self.step)

    def save_state(self) -> dict:
        return {"step": self.step}

    def load_state(self, state: dict) -> None:
        self.step = state["step"]


def train(
    backend: Any, num_steps: int = 2, *, resume: dict | None = None, **options: Any
) -> list[dict]:
    config = RLTrainingConfig(num_steps=num_steps, **{**CRITIC, **options})
    return anyio.run(
        lambda: run_rl_training(
            backend, None, Rollouts(), [], config, pad_token_id=PAD, resume=resume
        )
    )


def parameters(backend: Any) -> list[torch.Tensor]:
    modules = [
        backend.model,
        *([backend._trained.value_head] if backend._trained.value_head else []),
    ]
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def test_values_are_of_the_state_before_the_token(tmp_path):
    """Goal: entry t is the head on the hidden state of t - 1, for trained tokens alone. Red with that of t.

    The other way round is transformers' own hidden states of the padded batch.
    """
    backend = backend_with(tmp_path, head(seed=1))
    rollouts = rollout_batch(2, 2)
    batch = prepare_grpo_batch(
        rollouts, rollouts.rewards, RLTrainingConfig(num_steps=1, **CRITIC), pad_token_id=PAD
    )
    values_BT = anyio.run(lambda: backend.values(batch).result())
    output = tiny_model()(
        batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    )
    expected_BT = (
        head(seed=1)(output.hidden_states[-1].flatten(0, 1))
        .view(batch["input_ids"].shape)
        .roll(1, 1)
    )
    torch.testing.assert_close(values_BT, expected_BT * (batch["loss_mask"] != 0))
    assert values_BT.dtype == torch.float32 and not values_BT.requires_grad
    assert backend.model.training


def test_values_stay_float32_under_autocast(tmp_path):
    """Goal: bf16 rounds hidden states, not values. Red without autocast(enabled=False): the product is bf16."""
    hidden = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = head(seed=1)(hidden)
    assert torch.equal(found, head(seed=1)(hidden)) and found.dtype == torch.float32


def test_advantages_of_tokens_and_of_sequences_are_one_loss():
    """Goal: [B, T] with equal entries is [B]; and each token's own counts. Red with advantages read one too early."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (2, 5), generator=generator)
    mask = torch.tensor([[0.0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    advantages_B = torch.tensor([2.0, -1.0])
    expected = policy_loss(logits, labels, mask, advantages_B)
    assert policy_loss(logits, labels, mask, advantages_B[:, None].expand(2, 5)) == expected
    one = torch.zeros(2, 5)
    one[0, 3] = 5.0  # the mean over 5 trained tokens
    log_prob = torch.log_softmax(logits[0, 2], -1)[labels[0, 3]]
    assert policy_loss(logits, labels, mask, one).item() == pytest.approx(-log_prob.item())
    with pytest.raises(ValueError, match="advantages"):
        policy_loss(logits, labels, mask, torch.zeros(2, 4))


def test_the_value_term_by_hand():
    """Goal: policy loss + coef x the token mean of the value loss. Red with `aggregation`'s shares for it too."""
    keep = torch.tensor([[False, True, True], [True, False, False]])
    mask = torch.cat([torch.zeros(2, 1), keep.float()], 1)
    values = torch.tensor([0.1, 0.9, -0.4])
    logits = TokenLogProbs(keep, torch.tensor([-1.0, -2.0, -3.0]), None, 1.0, values)
    labels, returns, old = torch.zeros(2, 4).long(), torch.rand(2, 4), torch.rand(2, 4)
    options: dict[str, Any] = {"aggregation": "sequence_mean_token_mean", "value_clip": 0.2}
    policy = policy_loss(logits, labels, mask, torch.ones(2), **options)
    whole = policy_loss(
        logits,
        labels,
        mask,
        torch.ones(2),
        returns=returns,
        old_values=old,
        value_coef=0.3,
        **options,
    )
    expected = value_loss(values, returns[:, 1:][keep], old[:, 1:][keep], 0.2).mean()
    assert (whole - policy).item() == pytest.approx(0.3 * expected.item(), abs=1e-6)
    for missing, name in ((("returns", None), "returns"), (("old_values", None), "old_values")):
        given = {"returns": returns, "old_values": old, "value_coef": 0.3, **dict([missing])}
        with pytest.raises(ValueError, match=f"{name}=None"):
            policy_loss(logits, labels, mask, torch.ones(2), **options, **given)
    with pytest.raises(ValueError, match="these logits have none"):
        policy_loss(
            torch.zeros(2, 4, 5), labels, mask, torch.ones(2), returns=returns, value_coef=0.3
        )


def test_with_values_of_0_it_is_reinforce(tmp_path):
    """Goal: gamma = lambda = 1 and a head that still says 0 give REINFORCE's step bit for bit. Red with lambda 0.95."""
    critic = backend_with(tmp_path / "critic", head())
    plain = backend_with(tmp_path / "plain", None)
    found = train(critic, 1, gamma=1.0, gae_lambda=1.0)
    expected = train(plain, 1, baseline=0.0)
    assert all(
        torch.equal(a, b) for a, b in zip(parameters(critic), parameters(plain), strict=False)
    )
    assert (found[0]["entropy"], found[0]["grad_norm"]) == (
        expected[0]["entropy"],
        expected[0]["grad_norm"],
    )
    rewards = [
        0.5 * sample.reward**2
        for sample in rollout_batch(3, 3, seed=1).samples
        for _ in range(sample.response_length)
    ]
    assert found[0]["value_loss"] == pytest.approx(sum(rewards) / len(rewards))
    assert found[0]["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert critic._trained.value_head.weight.abs().sum() > 0  # it has begun to learn


@pytest.mark.parametrize(
    "cut", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_tokens": 17}]
)
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_no_cut_of_a_step_changes_it(tmp_path, cut, norm):
    """Goal: micro-batches are a matter of memory alone. Red with "batch" taken over each micro-batch."""
    whole = backend_with(tmp_path / "whole", head(seed=1), value_clip=0.2)
    parts = backend_with(tmp_path / "parts", head(seed=1), value_clip=0.2)
    expected = train(whole, advantage_norm=norm)
    found = train(parts, advantage_norm=norm, **cut)
    for key in ("loss", "grad_norm", "explained_variance", "value_loss", "clip_fraction"):
        assert [record[key] for record in found] == pytest.approx(
            [r[key] for r in expected], rel=1e-4, abs=1e-6
        ), key
    for a, b in zip(parameters(whole), parameters(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_batch_norm_standardises_the_trained_tokens(tmp_path):
    """Goal: mean 0 and deviation 1 over tokens, whatever the cut; untrained tokens stay 0. Red with ddof 0.

    And the explained variance is by hand: 1 - Var(return - value) / Var(return).
    """
    backend = backend_with(tmp_path, head(seed=1))
    rollouts = rollout_batch(3, 3)
    batch = prepare_grpo_batch(
        rollouts, rollouts.rewards, RLTrainingConfig(num_steps=1, **CRITIC), pad_token_id=PAD
    )
    cut = list(split_batch(batch, rank=0, world_size=1, micro_batch_size=2))
    call = partial(add_value_advantages, backend, cut, gamma=0.9, gae_lambda=0.8, norm="batch")
    metrics = anyio.run(call)
    keep = [part["loss_mask"][:, 1:] != 0 for part in cut]

    def tokens(key: str) -> torch.Tensor:
        return torch.cat(
            [part[key][:, 1:][kept] for part, kept in zip(cut, keep, strict=True)]
        ).double()

    advantages = tokens("advantages")
    assert (advantages.mean().item(), advantages.std().item()) == pytest.approx(
        (0.0, 1.0), abs=1e-6
    )
    assert all(not part["advantages"][part["loss_mask"] == 0].any() for part in cut)
    errors = tokens("returns") - tokens("old_values")
    explained = 1 - errors.var() / tokens("returns").var()
    assert metrics["explained_variance"] == pytest.approx(explained.item(), abs=1e-6)
    assert metrics["value_loss"] == pytest.approx((errors.square().mean() / 2).item(), rel=1e-6)


def test_a_tools_tokens_are_no_actions(tmp_path):
    """Goal: GAE passes over what is masked between two actions. Red with positions in place of trained tokens."""
    backend = backend_with(tmp_path, head(seed=1))
    tokens = [3, 4, 5, 6, 7, 8]
    masks = [[0.0, 1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]
    samples = [Sample("p", tokens=tokens, loss_mask=mask, response_length=5) for mask in masks]
    rollouts = RolloutBatch([tokens] * 2, masks, [1.0, 1.0], [5, 5], samples=samples)
    batch = prepare_grpo_batch(rollouts, rollouts.rewards, RLTrainingConfig(num_steps=1, **CRITIC))
    anyio.run(
        partial(add_value_advantages, backend, [batch], gamma=0.5, gae_lambda=1.0, norm="none")
    )
    for row, places in enumerate(([1, 4, 5], [3, 4, 5])):
        assert batch["returns"][row, places].tolist() == pytest.approx([0.25, 0.5, 1.0])
        assert not batch["returns"][row, [place for place in range(6) if place not in places]].any()


def test_resume_is_bit_for_bit_and_asks_for_the_same_baseline(tmp_path):
    """Goal: 2 + resume + 2 steps equal 4, head and its optimizer too. Red with the head's state not saved."""
    whole = backend_with(tmp_path / "whole", head())
    expected = train(whole, 4)
    first = train(backend_with(tmp_path / "half", head()), 2)
    latest = tmp_path / "half" / "latest"
    resumed = backend_with(tmp_path / "half", head(seed=5), seed=9)
    second = train(resumed, 4, resume=anyio.run(resumed.load_checkpoint, latest))
    for key in ("loss", "explained_variance", "grad_norm"):
        assert [record[key] for record in first + second] == [record[key] for record in expected]
    assert all(
        torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True)
    )
    # all that an engine finds
    assert [path.name for path in latest.glob("*.safetensors")] == ["model.safetensors"]
    without = backend_with(tmp_path / "half", None)
    with pytest.raises(CheckpointError, match="was saved with a value head, and this run has none"):
        anyio.run(without.load_checkpoint, tmp_path / "half" / "latest")


def test_a_head_that_is_not_finite_moves_nothing(tmp_path):
    """Goal: a head's gradient of inf stops the step by name, and the policy stays too. Red with the norm unchecked."""
    critic = backend_with(tmp_path, head(seed=1))
    rollouts = rollout_batch(2, 2)
    batch = prepare_grpo_batch(
        rollouts, rollouts.rewards, RLTrainingConfig(num_steps=1, **CRITIC), pad_token_id=PAD
    )
    shape = batch["input_ids"].shape
    batch |= {
        "advantages": torch.ones(shape),
        "returns": torch.ones(shape),
        "old_values": torch.zeros(shape),
    }
    before = parameters(critic)
    critic.forward_backward(batch).wait()
    critic._trained.value_head.bias.grad.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="of the value head at step 1"):
        critic.optim_step().wait()
    assert critic.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(critic), strict=True))


def test_several_updates_use_the_values_from_before_the_first(tmp_path):
    """Goal: each update is an optimizer step, and the clip holds values near those before the batch.

    Red with values taken anew for each update: a clip of 1e-9 then stops nothing; and with optimizer_steps the step.
    """
    backends = {}
    for name, clip in (("free", None), ("held", 1e-9)):
        backend = backends[name] = backend_with(tmp_path / name, head(), value_clip=clip)
        metrics = train(backend, 1, updates_per_batch=3)
        assert metrics[0]["step"] == metrics[0]["optimizer_steps"] == backend.step == 3
        assert metrics[0]["clip_fraction"] > 0
    one = backend_with(tmp_path / "one", head())
    train(one, 1)
    free, held, single = (
        b._trained.value_head.weight.detach().norm().item()
        for b in (backends["free"], backends["held"], one)
    )
    assert free > 2 * single > 0 and held < free


class LettersManager:
    """Three tokens after a prompt of two, sampled from what the engine serves; a pure function of both."""

    def __init__(self, buffer: CountingBuffer, engine: PolicyEngine) -> None:
        self.buffer, self.engine = buffer, engine

    @torch.no_grad()
    async def generate_batch(self, reward_fn: Any = None) -> RolloutBatch:
        rng = random.Random(str(self.buffer.get_prompts(1)))
        prompts = [[rng.randrange(2, VOCAB) for _ in range(2)] for _ in range(32)]
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        ids = torch.tensor(prompts)
        log_probs = []
        for _ in range(3):
            step = torch.log_softmax(self.engine.model(input_ids=ids).logits[:, -1], -1)
            token = torch.multinomial(step.exp(), 1, generator=generator)
            ids = torch.cat([ids, token], 1)
            log_probs.append(step.gather(1, token))
        samples = [
            Sample("p", "", tokens, [0.0] * 2 + [1.0] * 3, rollout_log_probs=own, response_length=3)
            for tokens, own in zip(ids.tolist(), torch.cat(log_probs, 1).tolist(), strict=True)
        ]
        for sample in samples:
            sample.reward = sum(token < VOCAB // 2 for token in sample.tokens[2:]) / 3
        masks = [sample.loss_mask for sample in samples]
        return RolloutBatch(
            ids.tolist(), masks, [s.reward for s in samples], [3] * 32, samples=samples
        )


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
def test_it_learns_with_one_sample_a_prompt(tmp_path, runtime):
    """Goal: the reward rises without any group to compare with. Red with the advantages' sign flipped."""
    backend, buffer, engine = (
        backend_with(tmp_path / "rl", head(lr=5e-2), seed=1),
        CountingBuffer(),
        PolicyEngine(),
    )
    manager = LettersManager(buffer, engine)
    config = RLTrainingConfig(num_steps=30, baseline="value", advantage_norm="batch")
    metrics = anyio.run(
        lambda: run_rl_training(backend, buffer, manager, [engine], config), backend=runtime
    )
    rewards = [record["reward_mean"] for record in metrics]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_values_come_to_explain_what_the_prompt_decides(tmp_path):
    """Goal: the head and, through it, the model learn to tell good prompts. Red with the head's step left out.

    Red also with hidden states detached before the head: it alone cannot tell (explained variance .3).
    """

    class Decided(Rollouts):
        async def generate_batch(self, reward_fn: Any = None) -> RolloutBatch:
            rollouts = rollout_batch(16, 1, seed=0)
            rollouts.rewards = [float(sample.tokens[0] % 2) for sample in rollouts.samples]
            return rollouts

    backend = backend_with(tmp_path, head(lr=5e-2))
    config = RLTrainingConfig(num_steps=40, baseline="value")
    metrics = anyio.run(lambda: run_rl_training(backend, None, Decided(), [], config))
    assert metrics[0]["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert metrics[-1]["explained_variance"] > 0.8
    assert metrics[-1]["value_loss"] < 0.2 * metrics[0]["value_loss"]


def test_what_has_no_values_says_so(tmp_path):
    """Goal: a baseline without its head, a norm of groups, an unknown model are errors. Red: an AttributeError."""
    with pytest.raises(ValueError, match="this backend has no value head"):
        train(backend_with(tmp_path / "a", None), 1)
    with pytest.raises(ValueError, match="advantage_norm='group_std': with baseline='value'"):
        train(backend_with(tmp_path / "b", head()), 1, advantage_norm="group_std")
    with pytest.raises(ValueError, match="value_head: needs a loss of rl_losses"):
        tiny_backend(
            tmp_path / "c",
            loss_fn=lambda logits, labels, loss_mask: logits.sum(),
            value_head=head(),
        )
    assert "qwen2" in forward.PACKABLE


@pytest.mark.parametrize("noise", [0.0, 3e-8, -6e-8])
def test_values_that_predict_rewards_but_for_rounding_leave_no_advantage(noise):
    """Goal: what float32 leaves of 0.3 less 0.3 is not blown up to ±1, and constant returns explain nothing. Red with
    the variance compared with 0."""

    class Predicted:
        def values(self, batch: dict[str, Any]) -> Any:
            values_BT = torch.where(batch["loss_mask"] != 0, 0.3, 0.0)
            values_BT[0] += noise * (batch["loss_mask"][0] != 0)
            return SimpleNamespace(result=partial(later, values_BT))

    async def later(values_BT: torch.Tensor) -> torch.Tensor:
        return values_BT

    rollouts = rollout_batch(3, 3)
    config = RLTrainingConfig(num_steps=1, baseline="value", gamma=1.0, gae_lambda=1.0)
    batch = prepare_grpo_batch(
        rollouts, [0.1 + 0.2] + [0.3] * (len(rollouts.rewards) - 1), config, pad_token_id=PAD
    )
    call = partial(
        add_value_advantages, Predicted(), [batch], gamma=1.0, gae_lambda=1.0, norm="batch"
    )
    assert anyio.run(call)["explained_variance"] == 0.0
    assert not batch["advantages"].any()
