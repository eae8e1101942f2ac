"""The benchmarks run, and say what they measured; no test here measures anything."""

import re
import sys

import pytest
import torch
from conftest import ROOT, random_model

import recode
from bench import bench, sides
from bench import random_model as made

MAX_LINES = 650
MAX_FILES = 3
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


@pytest.fixture
def flags(tmp_path):
    """Flags of grpo.py for steps of 2 x 2 completions of a random model."""
    made.make(str(tmp_path), "shrunk", 1 / 8, 120, False)
    flags = ["--model", str(tmp_path), "--data", str(tmp_path / "data.jsonl"), *bench.SAME]
    return [*flags, *"--prompts-per-step 2 --num-samples 2 --max-new-tokens 8 --r 4".split()]


@LINUX
def test_our_side_runs(flags):
    """Stops the benchmark from calling names that the training loop no longer has."""
    answer = sides.ours(sides.Spec("ours", flags))
    assert len(answer["steps"]) == sides.STEPS and answer["dtype"] == "float32"
    for step in answer["steps"]:
        assert len(step["lengths"]) == 4 and step["rollout"] > 0 and step["update"] > 0
    assert answer["config"]["num_samples"] == 2


def test_gradients_are_compared(flags, tmp_path, monkeypatch):
    """Stops a comparison that calls another objective equal, or the same one different."""
    monkeypatch.setattr(recode, "sample", recode.sample)  # restored afterwards
    spec = sides.Spec("gradients", [*flags, "--beta", "0.1"], file=str(tmp_path / "gradient.pt"))
    assert sides.gradients(spec) == {}
    assert sides.gradients(spec)["worst"] < 1e-5
    spec.flags[-1] = "0.2"
    assert sides.gradients(spec)["error"] > 1e-3


def test_trl_computes_in_its_own_way(monkeypatch):
    """Stops a comparison with a TRL that runs our RMSNorm, or without cuDNN's attention."""
    model = random_model("qwen2")
    norm = type(model.model.norm)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    sides.check_untouched(model)
    model.model.norm.forward = torch.relu
    with pytest.raises(AssertionError, match="RMSNorm"):
        sides.check_untouched(model)
    del model.model.norm.forward
    monkeypatch.setattr(norm, "forward", sides.score)
    with pytest.raises(AssertionError, match="RMSNorm"):
        sides.check_untouched(model)
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    with pytest.raises(AssertionError, match="cuDNN"):
        sides.check_untouched(model)


def test_table():
    """Stops ratios the wrong way round, and a comparison of answers of unequal length."""
    step = {"rollout": 1.0, "update": 3.0, "lengths": [10, 30]}
    ours = {"steps": [step], "peak": 50}
    slow = {"steps": [step | {"rollout": 3.0}], "peak": 100}
    lines = list(bench.table({"ours": [ours], "TRL": [slow]}))
    assert lines[2].startswith("| ours | 4 (1.00) | 100 (1.00) | 25 (1.00) |")
    assert lines[3].startswith("| TRL | 6 (1.50) | 150 (1.50) | 75 (3.00) | 75 (1.00) | 100 (3.00)")
    assert lines[3].endswith("| 20 (1.00) | 100 (2.00) |")
    assert len(lines) == 4
    long = {"steps": [step | {"lengths": [40, 60]}], "peak": 50}
    assert "INVALID" in list(bench.table({"ours": [ours], "TRL": [long]}))[-1]


def test_the_benchmarks_are_small():
    """Stops benchmarks that grow larger than what they measure, or that import each other."""
    texts = {path.stem: path.read_text() for path in (ROOT / "bench").glob("*.py")}
    assert len(texts) <= MAX_FILES
    assert sum(len(text.splitlines()) for text in texts.values()) <= MAX_LINES
    for text in texts.values():
        assert not re.search(rf"(?m)^\s*(import|from) ({'|'.join(texts)})\b", text)
