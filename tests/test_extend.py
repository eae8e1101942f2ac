"""What a user adds without editing other files: an algorithm with a metric, a reward, Dr. GRPO."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import data
import grpo
import reward

SMALL = "--steps 2 --prompts-per-step 2 --num-samples 2 --max-new-tokens 8 --quiet".split()
ENTROPY = (  # grpo.py with an entropy bonus: (old line, new lines)
    ("    beta: float = 0.001  #",
     "    bonus: float = 0.01  # weight of the entropy bonus\n    beta: float = 0.001  #"),
    (16 * " " + "loss.backward()",
     16 * " " + "surprise = -(logps * part.mask).sum() / count  # its mean is the entropy\n"
     + 16 * " " + "loss = loss - config.bonus * surprise\n" + 16 * " " + "loss.backward()"),
    (16 * " " + 'sums["loss"] +=',
     16 * " " + 'sums["entropy"] += surprise.item()\n' + 16 * " " + 'sums["loss"] +='),
)  # fmt: skip


def edited(path, edits):
    """A copy of grpo.py at `path` with some lines changed."""
    text = (ROOT / "grpo.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def flags(tmp_path, checkpoints, write_rows, rows, name):
    return [
        *SMALL,
        "--model",
        checkpoints["qwen2"],
        "--data",
        write_rows(rows),
        "--output",
        str(tmp_path / name),
    ]


@pytest.mark.slow
def test_a_fourth_algorithm(tmp_path, checkpoints, write_rows, rows):
    """Stops a new setting or metric from needing an edit elsewhere, on one rank or two."""
    changed = sum(new.count("\n") + 1 - old.count("\n") for old, new in ENTROPY) - len(ENTROPY)
    assert changed <= 6
    script = edited(tmp_path / "entropy.py", ENTROPY)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    for name, start in (("one", [sys.executable]), ("two", torchrun)):
        more = ["--bonus", "0.0" if name == "one" else "0.5"]
        argv = [*start, script, *flags(tmp_path, checkpoints, write_rows, rows, name), *more]
        done = subprocess.run(
            argv, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2 and all(json.loads(line)["entropy"] > 0 for line in lines)
        assert json.loads((tmp_path / name / "config.json").read_text())["bonus"] == float(more[1])


def test_a_reward_of_your_own(tmp_path, checkpoints, write_rows, rows, monkeypatch):
    """Stops a reward from seeing only the reference: this one reads old code and note too."""
    seen = []

    def fresh(grade, example):
        seen.append(example)
        if grade.code is None:
            return -2.0
        kept = example.old_code in grade.code
        return 2.0 - 2.0 * kept

    monkeypatch.setitem(reward.CORRECTNESS, "fresh", fresh)
    argv = flags(tmp_path, checkpoints, write_rows, rows, "own")
    assert grpo.main([*argv, "--correctness", "fresh"]) == 0
    assert len(seen) == 8 and all(isinstance(example, data.Example) for example in seen)
    assert all(example.old_code and example.update_info for example in seen)


def test_an_answer_is_graded_once(monkeypatch):
    """Stops an answer from being extracted, parsed and compared again for every metric."""
    calls = []
    for name in ("extract_code", "parses", "levenshtein"):
        real = getattr(reward, name)
        monkeypatch.setattr(
            reward, name, lambda *args, real=real, name=name: calls.append(name) or real(*args)
        )
    example = data.Example("lib", "2", "", "note", "x = 1", "x = 2")
    grade = reward.grade("\n</think>\n<answer>\n```python\nx = 3\n```\n</answer>", example)
    reward.total(grade, example)
    assert grade.em == grade.stale == 0 and grade.parses and grade.es == 0.8
    assert sorted(calls) == ["extract_code", "levenshtein", "parses"]


def test_dr_grpo_as_the_exercise_says(tmp_path):
    """Stops the documented exercise from needing more than the lines of eq. 3 and 8."""
    edits = (
        ("    return (rewards - mean) / (std + 1e-4)  # eq. 3",
         "    return rewards - mean  # eq. 3"),
        ("    return mask / mask.sum(1, keepdim=True) / len(mask)  # eq. 8",
         "    return mask / config.max_new_tokens / len(mask)  # eq. 8"),
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("dr_grpo", edited(tmp_path / "dr_grpo.py", edits))
    module = importlib.util.module_from_spec(spec)
    sys.modules["dr_grpo"] = module
    spec.loader.exec_module(module)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    weights = module.token_weights(mask, module.Config(max_new_tokens=10))
    torch.testing.assert_close(weights, torch.tensor([[0.05, 0.05, 0], [0.05, 0, 0]]).double())
    rewards = torch.tensor([[1.0, 3.0]])
    assert module.advantages(rewards).tolist() == [[-1.0, 1.0]]
