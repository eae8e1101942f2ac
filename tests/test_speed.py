"""lib/speed.py may be deleted: the toy learns the same without it."""

import contextlib
import json

import pytest
from conftest import ROOT

import grpo
from lib import speed


def run(path):
    """The metrics of six small steps of the toy, without times."""
    flags = f"--model {ROOT}/tiny --steps 6 --prompts-per-step 2 --heldout= --quiet --output {path}"
    assert grpo.main(flags.split()) == 0
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    return [{name: row[name] for name in row if "second" not in name} for row in rows]


def test_results_stay_without_it(tmp_path, monkeypatch):
    """Stops a fast path that changes results, and one that the rest of the code cannot do without.

    The toy is taken for a large model, so its weights are packed.
    """
    fused = []
    real = speed.packed_weights

    def note(model):
        fused.append("forward" in vars(model.model.norm))
        return real(model)

    with monkeypatch.context() as patch:
        patch.setattr(speed, "LARGE", 0)
        patch.setattr(speed, "keep_freed_memory", lambda: None)  # it would last
        patch.setattr(speed, "packed_weights", note)
        fast = run(tmp_path / "with")
    assert fused == 6 * [True]
    monkeypatch.setattr(speed, "prepare", lambda model: None)
    monkeypatch.setattr(speed, "packed_weights", contextlib.nullcontext)
    monkeypatch.setattr(speed, "capture_and_check", lambda *args: (None, None))
    slow = run(tmp_path / "without")
    for row, other in zip(fast, slow, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
