"""tools/experiments.py: the control, going on after a stop, the table; its figures are in the README as they came out."""

import json
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from tools import experiments
import reward

SMALL = ["--prompts-per-step", "2", "--max-new-tokens", "8"]
FIGURES = {"em": 0.5, "stale": 0.25, "format": 1.0, "reward": 2.0}


@pytest.fixture
def measured(monkeypatch):
    """What measure() was called with, in place of its work; it gives FIGURES for every split."""
    calls, real = [], reward.total
    monkeypatch.setattr(experiments, "measure", lambda model: calls.append((model, reward.total is real)) or result())
    return calls


def result(**changes):
    return {split: FIGURES | changes for split in experiments.SPLITS}


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_control_is_rewarded_at_random_and_measured_truly(tmp_path, measured):
    """Stops a control that sees the real reward, or one whose figures are as random as its rewards."""
    path = experiments.directory(tmp_path, "GRPO, random reward", 1)
    experiments.train("GRPO, random reward", 1, path, ["--steps", "1", "--num-samples", "8", *SMALL])
    rewards = {json.loads(line)["reward"] for line in (path / "samples.jsonl").read_text().splitlines()}
    assert len(rewards) == 8 and max(rewards) > 0.1  # answers cut after 8 tokens all earn -3
    assert [true for _, true in measured] == [True]


def test_a_run_goes_on(tmp_path, measured):
    """Stops a suite that starts a stopped run anew, or measures something else than the adapter it trained."""
    path = experiments.directory(tmp_path, "SFT", 1)
    experiments.train("SFT", 1, path, ["--steps", "1", *SMALL])
    first = rows(path)
    got = experiments.train("SFT", 1, path, ["--steps", "2", *SMALL])
    assert rows(path)[0] == first[0] and [row["step"] for row in rows(path)] == [1, 2]
    assert got["seconds"] == sum(v for row in rows(path) for k, v in row.items() if k.startswith("seconds"))
    layer = measured[-1][0].model.layers[0].self_attn.q_proj
    assert layer.lora_B.abs().sum() > 0


def test_what_is_there_is_not_done_again(tmp_path):
    """Stops finished runs from being trained again, seeds that overwrite each other, errors lost in a worker."""
    runs = [("base", 0), ("GRPO, EM\\*", 1), ("GRPO, EM\\*", 2), ("GRPO, EM", 1)]
    for number, (name, seed) in enumerate(runs):
        path = experiments.directory(tmp_path, name, seed)
        assert not path.exists()
        path.mkdir()
        (path / "result.json").write_text(json.dumps(result(em=number / 4) | {"seconds": 1.0}))
    found = experiments.results(runs, tmp_path, 1, [])
    assert {name: [run["heldout"]["em"] for run in seeds] for name, seeds in found.items()} == {
        "base": [0.0], "GRPO, EM\\*": [0.25, 0.5], "GRPO, EM": [0.75],
    }  # fmt: skip
    with pytest.raises(KeyError, match="nothing"):
        experiments.results([("nothing", 1)], tmp_path, 1, [])


def test_table_and_picture_by_hand():
    """Stops a mean over the wrong runs, a biased deviation, a column under the wrong heading, a broken SVG."""
    seeds = [result(em=em) | {"seconds": s} for em, s in ((0.1, 10.0), (0.2, 20.0), (0.6, 30.0))]
    seeds[0]["retention"] = FIGURES | {"em": 0.9}
    by_name = {"base": [result() | {"seconds": 0.0}], "GRPO (ES\\*)": seeds}
    head, _, base, grpo = experiments.table(by_name).splitlines()
    assert head == "| | exact match | stale | format | sampled reward | retention | two updates | seconds |"
    assert base == "| base | 0.500 | 0.250 | 1.000 | 2.000 | 0.500 | 0.500 | 0 |"
    assert grpo.startswith(
        "| GRPO (ES\\*) | 0.300 ± 0.265 | 0.250 ± 0.000 | 1.000 ± 0.000 | 2.000 ± 0.000 | 0.567 ± 0.351"
    )
    assert grpo.endswith("| 0.300 ± 0.265 | 20 ± 10 |")
    assert len(ElementTree.fromstring(experiments.picture(by_name)).findall(".//*[@r='3']")) == 3 * 4


def test_readme_shows_the_table_as_it_came_out():
    """Stops figures in the README that no command gave."""
    assert (ROOT / "figures" / "experiments.md").read_text() in (ROOT / "README.md").read_text()
