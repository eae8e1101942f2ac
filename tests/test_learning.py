"""The embedded toy: it has the bad habit, RL removes it, and random rewards do not.

The control needs no switch in the program: the test replaces reward.total with random numbers.
"""

import json
import random
import re
import sys

import pytest
from conftest import ROOT

import dapo
import data
import grpo
import reward
import sft

TINY = ROOT / "tiny"
QUIET = ["--heldout", str(TINY / "dev.jsonl"), "--save-every", "1000", "--show-every", "1000"]


def heldout(output):
    metrics = json.loads((output / "heldout.json").read_text())
    return metrics["before"], metrics["after"]


def test_six_steps_raise_the_reward(tmp_path):
    """Stops an update without effect or in the wrong direction, at a high learning rate."""
    settings = ["--steps", "6", "--lr", "4e-3", "--warmup", "0", "--heldout", "", "--quiet"]
    assert grpo.main([*settings, "--output", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    assert rewards[0] < 1.8 and min(rewards[3:]) > 2.3


@pytest.mark.slow
def test_grpo_unlearns_the_stale_habit(tmp_path):
    """Stops an update without effect or in the wrong direction, and settings that do not learn."""
    assert grpo.main([*QUIET, "--output", str(tmp_path / "run")]) == 0
    before, after = heldout(tmp_path / "run")
    assert before["em"] <= 0.30 and after["em"] >= 0.70
    assert before["stale"] >= 0.40 and after["stale"] <= 0.10
    assert after["reward"] >= before["reward"] + 0.80


@pytest.mark.slow
@pytest.mark.parametrize("script, steps", [(dapo, 30), (sft, 100)], ids=["dapo", "sft"])
def test_dapo_and_sft_learn_too(script, steps, tmp_path):
    """Stops an algorithm that runs but does not learn, or does not learn to follow the note."""
    assert script.main([*QUIET, "--steps", str(steps), "--output", str(tmp_path / "run")]) == 0
    before, after = heldout(tmp_path / "run")
    assert after["em"] >= before["em"] + 0.30 and after["stale"] <= before["stale"] - 0.30
    assert after["reward"] >= before["reward"] + 0.60


@pytest.mark.slow
def test_random_rewards_teach_nothing(tmp_path, monkeypatch):
    """Stops a gain that has another source than the reward, e.g. leaked targets.

    The mean of three seeds: a single run drifts by up to a tenth either way.
    """
    gains = []
    for seed in range(3):
        rng, path = random.Random(seed), tmp_path / str(seed)
        monkeypatch.setattr(reward, "total", lambda *_, rng=rng: rng.uniform(-3, 3))
        assert grpo.main([*QUIET, "--steps", "15", "--output", str(path)]) == 0
        before, after = heldout(path)
        gains.append({name: after[name] - before[name] for name in ("em", "es")})
    assert sum(gain["em"] for gain in gains) / 3 <= 0.10
    assert sum(gain["es"] for gain in gains) / 3 <= 0.03


def names(split):
    """All two-word names in a task file."""
    return set(re.findall(r"[a-z]+_[a-z]+", (TINY / f"{split}.jsonl").read_text())) - {
        "new_version", "update_info", "old_code", "new_code"
    }  # fmt: skip


@pytest.mark.parametrize("split", ["dev", "heldout", "retention", "two_updates"])
def test_held_out_names_never_occur_in_training(split):
    """Stops held-out metrics that memorised names could explain."""
    assert names(split) and not names(split) & names("train")


def test_heldout_tasks_ask_for_a_change():
    """Stops held-out tasks that an exact copy solves, and too few tasks."""
    examples = data.load_examples(str(TINY / "heldout.jsonl"))
    assert len(examples) >= 256
    assert all(
        reward.strip_comments(e.old_code) != reward.strip_comments(e.new_code) for e in examples
    )
    assert all(reward.parses(e.old_code) for e in examples)


def test_retention_tasks_ask_for_no_change():
    """Stops a retention task whose note is about the code: leaving it alone would be wrong."""
    examples = data.load_examples(str(TINY / "retention.jsonl"))
    assert len(examples) >= 256 and all(e.old_code == e.new_code for e in examples)
    for e in examples:
        shared = set(re.findall(r"[a-z]+_[a-z]+", e.update_info)) & set(
            re.findall(r"[a-z]+_[a-z]+", e.old_code)
        )
        assert shared <= {e.dependency}


def test_two_updates_ask_for_two_changes():
    """Stops a task with two notes that one change solves, and such tasks in training."""
    examples = data.load_examples(str(TINY / "two_updates.jsonl"))
    assert len(examples) >= 256 and all(len(e.update_info.split("\n")) == 2 for e in examples)
    for e in examples:
        old, new = e.old_code.split("\n"), e.new_code.split("\n")
        assert len(old) == len(new) and sum(a != b for a, b in zip(old, new)) == 2
    assert all("\n" not in e.update_info for e in data.load_examples(str(TINY / "train.jsonl")))


def test_tiny_is_small_and_reproducible(tmp_path, tokenizer):
    """Stops shipped tasks or a tokenizer that make.py no longer reproduces exactly."""
    sys.path.insert(0, str(TINY))
    import make

    make.write_tasks(tmp_path)
    for split in ("train", "dev", "heldout", "retention", "two_updates"):
        assert (tmp_path / f"{split}.jsonl").read_text() == (TINY / f"{split}.jsonl").read_text()
    assert json.loads((TINY / "defaults.json").read_text()) == make.DEFAULTS
    fresh = make.make_tokenizer()
    for example in data.load_examples(str(TINY / "dev.jsonl"))[:50]:
        ids = data.encode_prompt(example, tokenizer)
        assert ids == data.encode_prompt(example, fresh) and len(ids) <= 80
    checkpoint = [
        path for path in TINY.iterdir() if path.suffix not in (".jsonl", ".py") and path.is_file()
    ]
    assert sum(path.stat().st_size for path in checkpoint) <= 2 * 2**20
