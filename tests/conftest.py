"""Shared by all tests: small random checkpoints of three families, and a few tasks of our own.

PEFT and rapidfuzz are oracles for some tests, which are skipped without them. ../shared/data, where
it exists, holds the real data set.
"""

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before importing torch: the tests need no GPU

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import dapo
import grpo
import reward
import sft

torch.set_num_threads(1)  # the models are tiny: more threads would mostly wait for each other
SCRIPTS = [pytest.param(script, id=script.__name__) for script in (grpo, dapo, sft)]
TWINS = [  # where the three share the code under test
    pytest.param(grpo, id="grpo"),
    pytest.param(dapo, id="dapo", marks=pytest.mark.slow),
    pytest.param(sft, id="sft", marks=pytest.mark.slow),
]
FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
ONE_FAMILY = ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "llama"))]


def random_model(family, vocab_size=97, **overrides):
    """A small model with random weights, large enough that its answers differ."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
        "max_position_embeddings": 4096,
        "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    if family == "qwen3":
        settings["head_dim"] = 16
    config = FAMILIES[family](**settings | overrides)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def fault_in_real_md(example):
    """data.fault() when the runs of docs/real.md were made: code of comments only was kept."""
    texts = (example.dependency, example.update_info, example.old_code, example.new_code)
    return "" if all(texts) and reward.parses(example.new_code) else "not usable"


def cells(line):
    """The cells of a line of a Markdown table, without the blanks that align them."""
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer):
    """{family: directory} of random checkpoints in HF layout, with the toy's tokenizer."""
    made = {}
    for family in FAMILIES:
        made[family] = str(tmp_path_factory.mktemp(family))
        model = random_model(family, len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        model.save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return made


ROWS = [
    {
        "dependency": "mathlib",
        "new_version": "==2.0",
        "description": "doubles a number",
        "update_info": f"twice_{i} was removed; use double_{i}.",
        "old_code": f"import mathlib\nx = mathlib.twice_{i}(4)",
        "new_code": f"import mathlib\nx = mathlib.double_{i}(4)",
    }
    for i in range(6)
]


@pytest.fixture
def rows():
    """Six valid records, as fresh dicts."""
    return [dict(row) for row in ROWS]


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(rows, name) writes a JSONL file and returns its path; a str is written as is."""

    def write(rows, name="data.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write
