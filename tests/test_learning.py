"""The embedded default: it is what it says it is, RL cures it, and chance does not.

The control needs no switch in the program: it trains with reward.score replaced by random numbers.
"""

import json
import random
import re
import sys

import pytest
from conftest import ROOT

import data
import grpo
import reward

TINY = ROOT / "tiny"
QUIET = ["--heldout", str(TINY / "dev.jsonl"), "--save-every", "1000", "--show-every", "1000"]


def heldout(output):
    figures = json.loads((output / "heldout.json").read_text())
    return figures["before"], figures["after"]


def test_grpo_unlearns_the_stale_habit(tmp_path):
    """An update that goes nowhere or the wrong way; settings or a checkpoint with which the lesson fails."""
    assert grpo.main([*QUIET, "--output", str(tmp_path / "run")]) == 0
    before, after = heldout(tmp_path / "run")
    assert before["em"] <= 0.30 and after["em"] >= 0.70
    assert before["stale"] >= 0.40 and after["stale"] <= 0.10
    assert after["reward"] >= before["reward"] + 0.80


def test_random_rewards_teach_nothing(tmp_path, monkeypatch):
    """A gain that comes from elsewhere than the reward (leaked targets, evaluation that differs from before)."""
    rng = random.Random(0)
    monkeypatch.setattr(reward, "score", lambda *_: rng.uniform(-3, 3))
    assert grpo.main([*QUIET, "--steps", "25", "--output", str(tmp_path / "run")]) == 0
    before, after = heldout(tmp_path / "run")
    assert after["em"] <= before["em"] + 0.10
    assert after["es"] <= before["es"] + 0.03


def names(split):
    """All two-word names in a file of tasks."""
    return set(re.findall(r"[a-z]+_[a-z]+", (TINY / f"{split}.jsonl").read_text())) - {
        "new_version", "update_info", "old_code", "new_code"
    }  # fmt: skip


@pytest.mark.parametrize("split", ["dev", "heldout"])
def test_held_out_names_never_occur_in_training(split):
    """Held-out figures that could come from memory."""
    assert names(split) and not names(split) & names("train")


def test_heldout_tasks_ask_for_a_change():
    """A held-out task that copying solves, which would count as obedience; too few of them to tell."""
    examples = data.load_examples(str(TINY / "heldout.jsonl"))
    assert len(examples) >= 256
    assert all(reward.strip_comments(e.old_code) != reward.strip_comments(e.new_code) for e in examples)
    assert all(reward.parses(e.old_code) for e in examples)


def test_tiny_is_small_and_regenerates(tmp_path, tokenizer):
    """Shipped files that make.py no longer makes: its tasks byte for byte, its tokenizer id for id."""
    sys.path.insert(0, str(TINY))
    import make

    make.write_tasks(tmp_path)
    for split in ("train", "dev", "heldout"):
        assert (tmp_path / f"{split}.jsonl").read_text() == (TINY / f"{split}.jsonl").read_text()
    assert make.DEFAULTS == json.loads((TINY / "defaults.json").read_text())
    fresh = make.make_tokenizer()
    for example in data.load_examples(str(TINY / "dev.jsonl"))[:50]:
        ids = data.encode_prompt(example, tokenizer)
        assert ids == data.encode_prompt(example, fresh) and len(ids) <= 80
    checkpoint = [path for path in TINY.iterdir() if path.suffix not in (".jsonl", ".py") and path.is_file()]
    assert sum(path.stat().st_size for path in checkpoint) <= 2 * 2**20
