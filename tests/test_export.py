"""tools/export.py: what is exported is the trained policy; bad input is refused in one line."""

import json
import shutil

import pytest
import torch

import sft
from tools import export
from lib import loading
from lib.config import BadInput


@pytest.fixture
def run(tmp_path, checkpoints, write_rows, rows):
    """The directory of a short run."""
    flags = "--steps 1 --prompts-per-step 2 --max-new-tokens 8 --r 4 --lr 0.01"
    places = ["--model", checkpoints["qwen2"], "--data", write_rows(rows)]
    assert sft.main([*places, *flags.split(), "--output", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_export(run, tmp_path, checkpoints, capsys):
    """Stops a checkpoint that is the untrained model, or that other programs cannot load."""
    output = tmp_path / "merged"
    output.mkdir()  # an empty directory will do
    assert export.main([str(run), "--output", str(output)]) == 0
    assert "rounding loses" in capsys.readouterr().out
    ids = torch.arange(5, 25)[None]
    base = loading.load_model(checkpoints["qwen2"])(ids).logits
    trained = loading.load_policy(checkpoints["qwen2"], str(run / "adapter"))(ids).logits
    merged = loading.load_model(str(output))(ids).logits
    assert (trained - base).abs().max() > 1e-3
    assert (trained - merged).abs().max() < 1e-4
    assert loading.load_tokenizer(str(output)).eos_token_id is not None


@pytest.mark.parametrize("place", ["base", "run", "file"])
def test_nothing_is_overwritten(run, tmp_path, checkpoints, monkeypatch, place):
    """Stops an export over its own base, its run or a file, and seconds of loading before that."""
    (tmp_path / "file").write_text("mine")
    output = {"base": checkpoints["qwen2"], "run": str(run), "file": str(tmp_path / "file")}[place]
    monkeypatch.setattr(export, "open_policy", None)
    with pytest.raises(BadInput, match=f"--output {output}: exists"):
        export.main([str(run), "--output", output])
    assert (tmp_path / "file").read_text() == "mine"


def damage(run, how):
    """Make a run directory unfit for export."""
    settings = json.loads((run / "config.json").read_text())
    if how == "no adapter":
        shutil.rmtree(run / "adapter")
    elif how == "no base":
        (run / "config.json").write_text(json.dumps(settings | {"model": str(run / "gone")}))
    elif how == "no settings":
        (run / "config.json").unlink()
    elif how == "another base":
        path = run / "adapter" / "adapter_config.json"
        other = json.loads(path.read_text()) | {"r": 8}
        path.write_text(json.dumps(other))
    else:
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"half")


@pytest.mark.parametrize(
    "how, word",
    [
        ("no adapter", "no adapter there"),
        ("no base", "no directory .*gone"),
        ("no settings", "config.json"),
        ("another base", "does not fit"),
        ("damaged", "damaged"),
    ],
)
def test_what_cannot_be_exported(run, tmp_path, how, word):
    """Stops a traceback, or half a checkpoint, where one line would do."""
    damage(run, how)
    with pytest.raises(BadInput, match=word) as error:
        export.main([str(run), "--output", str(tmp_path / "merged")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()
