"""DAPO: the objective against TRL, verl and by hand; dynamic sampling; the overlong penalty."""

import pytest
import torch
from conftest import SHARED
from test_grpo import GOLDEN

import dapo
import data
import recode
import rollout
import reward
from lib import loading

CASES = [case for case in GOLDEN["cases"] if "dapo" in case["name"]]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/golden_losses.json is not here")
def test_there_are_cases():
    """Stops a filter that selects no stored case, which would leave the next test empty."""
    assert {case["peer"] for case in CASES} == {"trl", "verl"} and len(CASES) >= 7


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_objective_equals_the_peers(case):
    """Stops a loss, gradient or advantage that is not verl's token mean (c = 10) or TRL's dapo."""
    read = lambda name: torch.tensor(case[name], dtype=torch.float64)
    new, A = read("new_logps").requires_grad_(), read("advantages")
    old = new.detach() if case["on_policy"] else read("old_logps")
    weights = dapo.token_weights(torch.tensor(case["mask"]).bool(), dapo.Config())
    loss = -(weights * dapo.objective(new, old, None, A, dapo.Config())).sum()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(loss, new)[0], read("grad_new_logps"), atol=1e-9, rtol=0
    )
    rewards = read("rewards").view(
        -1, case["num_generations"] if "num_generations" in case else len(A)
    )
    epsilon = (rewards.std(1, keepdim=True) + 1e-4) / (rewards.std(1, keepdim=True) + 1e-6)
    mine = dapo.advantages(rewards) * (epsilon if case["peer"] == "verl" else 1.0)
    torch.testing.assert_close(mine.flatten(), A, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "A, ratio, value, slope",
    [
        (1, 0.5, 0.5, 1), (1, 1.25, 1.25, 1), (1, 1.5, 1.28, 0), (1, 50.0, 1.28, 0),
        (-1, 0.5, -0.8, 0), (-1, 1.25, -1.25, -1), (-1, 9.9, -9.9, -1), (-1, 10.1, -10, 0),
        (-2, 50.0, -20, 0),
    ],
)  # fmt: skip
def test_clip_acts_on_the_right_side(A, ratio, value, slope):
    """Stops a clip-higher on the wrong side, and a dual clip that is inverted, misplaced or not
    scaled by A.
    """
    rho = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    J = dapo.objective(rho.log(), torch.zeros(1, 1), None, torch.tensor([float(A)]), dapo.Config())
    assert J.item() == pytest.approx(value) and torch.autograd.grad(J, rho)[
        0
    ].item() == pytest.approx(slope)


def test_token_weights_by_hand():
    """Stops a mean of means: every token of the update batch has one weight, EOS included."""
    weights = dapo.token_weights(
        torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool(), dapo.Config()
    )
    expected = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]) / 8
    torch.testing.assert_close(weights, expected, check_dtype=False)


# ------------------------------------------------------------------------- dynamic sampling

TASKS = [
    ([5, 6, 7, n], data.Example("lib", "2.0", "", f"note {n}", "a = 1", f"a = {n}"))
    for n in range(8, 28)
]
ORDER = [task[0] for task in data.draw(TASKS, 0, 20, 42)]


@pytest.fixture
def collect(checkpoints, tokenizer, monkeypatch):
    """collect(scores, **settings) runs dapo.collect on TASKS; `scores` are one tuple per group."""
    model = loading.load_model(checkpoints["qwen2"])
    monkeypatch.setattr(rollout, "eos_ids", lambda *_: list(range(0, 600, 5)))

    def run(scores, **settings):
        stream = iter([score for group in scores for score in group])
        monkeypatch.setattr(reward, "total", lambda *_: next(stream))
        config = dapo.Config(
            **{"prompts_per_step": 3, "updates": 1, "num_samples": 2, "max_new_tokens": 8}
            | settings
        )
        result = dapo.collect(model, tokenizer, TASKS, 0, config)
        assert next(stream, None) is None, "not every score was used"
        return result

    return run


def test_groups_without_spread_are_replaced(collect):
    """Stops training on a group without spread, losing one with spread, and skipping a task."""
    scores = [
        (1.0, 1.0),
        (0.0, 1.0),
        (2.0, 2.0),
        (3.0, 3.0),
        (0.0, 3.0),
        (1.0, 2.0),
    ]  # draws of 3, 2 and 1
    batch, metrics, groups, position = collect(scores)
    assert position == 6 and [group.prompt for group in groups] == ORDER[:6]
    assert [group.rewards for group in groups] == [list(pair) for pair in scores]
    assert batch.prompts == [ORDER[i] for i in (1, 4, 5)] and batch.group.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    kept = torch.tensor([scores[i] for i in (1, 4, 5)])
    assert torch.equal(batch.advantages, dapo.advantages(kept).flatten())
    assert metrics["tries"] == 3 and metrics["groups"] == 3 and metrics["no_spread"] == 0.5
    assert metrics["reward"] == pytest.approx(19 / 12)  # over all sampled groups, kept or not
    assert [row.tolist() for row, keep in zip(batch.tokens, batch.mask)] == [
        ids + [0] * (batch.tokens.shape[1] - len(ids))
        for i in (1, 4, 5)
        for ids in groups[i].completions
    ]


def test_tries_are_bounded(collect):
    """Stops a run from looping forever or aborting when no group has spread (verl#953).

    It continues with the groups it has.
    """
    batch, metrics, _, position = collect([(0.0, 1.0), *[(2.0, 2.0)] * 8], max_tries=4)
    assert (
        batch.prompts == [ORDER[0]]
        and metrics["groups"] == 1
        and metrics["tries"] == 4
        and position == 9
    )
    batch, metrics, _, position = collect([(2.0, 2.0)] * 30)
    assert (
        batch.prompts == []
        and batch.mask.numel() == 0
        and metrics["groups"] == 0
        and metrics["tries"] == 10
    )
    assert position == 30 and metrics["no_spread"] == 1


def test_every_try_uses_new_random_numbers(collect):
    """Stops a refill that reuses the random numbers of the previous draw."""
    seen, sample = [], recode.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recode, "sample", lambda *args: seen.append(args[6]) or sample(*args))
        collect([(2.0, 2.0)] * 12, max_tries=4)
    assert len(seen) == len(set(seen)) == 4


@pytest.mark.parametrize(
    "cache, soft",
    [
        (0, [0] * 6),
        (20, [0, 0, -0.05, -0.5, -0.95, -1]),
        (100, [-0.1, -0.8, -0.81, -0.9, -0.99, -1]),
    ],
)
def test_overlong_by_hand(cache, soft, monkeypatch):
    """Stops a penalty that starts too early, jumps, exceeds 1 or divides by a cache of 0."""
    lengths, seen = (10, 80, 81, 90, 99, 100), []
    ids, rewards = [[6] * n for n in lengths], [0.0, 1, 2, 3, 4, 5]
    grades = [reward.grade("x", TASKS[0][1])] * 6
    group = rollout.Group([5], TASKS[0][1], ids, ["x"] * 6, rewards, [False] * 6, grades)
    monkeypatch.setattr(rollout, "sample_groups", lambda *_: [group])
    monkeypatch.setattr(dapo, "advantages", lambda rewards: seen.append(rewards) or rewards)
    config = dapo.Config(
        prompts_per_step=1, updates=1, num_samples=6, max_new_tokens=100, overlong_cache=cache
    )
    model = torch.nn.Module()
    model.device = "cpu"
    dapo.collect(model, None, TASKS, 0, config)
    torch.testing.assert_close(seen[0], torch.tensor([group.rewards]) + torch.tensor([soft]))


def test_spread_is_checked_before_the_overlong_penalty(collect):
    """Stops a length penalty from creating spread, and one that does not reach the advantages."""
    scores = [(1.0, 1.0)] * 5 + [(0.0, 1.0)] * 3
    batch, metrics, groups, _ = collect(scores, max_new_tokens=8, overlong_cache=8, max_tries=3)
    assert metrics["groups"] == 3 and metrics["no_spread"] == 5 / 8
    lengths = torch.tensor([[len(ids) for ids in group.completions] for group in groups[-3:]])
    assert (lengths[:, 0] != lengths[:, 1]).any()
    expected = dapo.advantages(torch.tensor([0.0, 1.0]) - lengths / 8)
    torch.testing.assert_close(batch.advantages.view(3, 2), expected)


def test_an_empty_rollout_changes_nothing(checkpoints):
    """Stops an empty rollout from crashing, counting as non-finite, or moving the weights."""
    model = loading.load_model(checkpoints["qwen2"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    batch = rollout.make_batch([], torch.zeros(0, 8), "cpu")
    metrics = dapo.update(model, optimizer, batch, dapo.Config())
    assert metrics == {"skipped": 0}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_short_rollout_is_split_between_groups(checkpoints, monkeypatch):
    """Stops a mini-batch that cuts a group in two, and metrics averaged over updates not made."""
    seen = []
    monkeypatch.setattr(
        dapo,
        "accumulate",
        lambda model, batch, config: seen.append(len(batch.mask)) or {"loss": 1.0},
    )
    parameter = torch.nn.Parameter(torch.ones(1))
    model = torch.nn.Module()
    model.weight = parameter
    monkeypatch.setattr(rollout, "batch_logps", lambda *_: torch.zeros(20, 3))
    batch = rollout.make_batch(
        [rollout.Group([5], None, [[6, 7, 8]] * 4)] * 5, torch.ones(5, 4), "cpu"
    )
    config = dapo.Config(prompts_per_step=6, updates=2, num_samples=4)
    metrics = dapo.update(model, torch.optim.AdamW([parameter]), batch, config)
    assert seen == [12, 8] and metrics["loss"] == 1.0
