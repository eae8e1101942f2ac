"""The adapter that ships, models/obey-0.5b: does it fit the model that its settings name?"""

import json

import safetensors.torch
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, Qwen2Config

import dora
from lib.config import open_policy

OBEY = ROOT / "models" / "obey-0.5b"
QWEN_05B = Qwen2Config(  # but for its 151,936 words, which no adapter touches
    vocab_size=97, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def test_it_fits_its_base():
    """Stops a shipped adapter with tensors that find no place, or a place without its tensor."""
    model = AutoModelForCausalLM.from_config(QWEN_05B, dtype=torch.bfloat16)
    dora.load_adapter(model, OBEY / "adapter")
    stored = safetensors.torch.load_file(OBEY / "adapter" / "adapter_model.safetensors")
    loaded = dora.peft_parameters(model)
    assert stored.keys() == loaded.keys() and len(stored) == 24 * 2 * 3  # q and v; A, B, magnitude
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(loaded[name].detach(), tensor.to(loaded[name].dtype)), name
    assert all(layer.lora_B.abs().max() > 0 for layer in dora.dora_layers(model).values())


def test_it_is_taken_like_a_run():
    """Stops a shipped directory that --model does not take, or that is larger than 4 MB."""
    base, adapter, settings = open_policy(str(OBEY))
    assert base == "Qwen/Qwen2.5-Coder-0.5B-Instruct" and adapter == str(OBEY / "adapter")
    assert settings["r"] == 16 and (OBEY / "README.md").is_file()
    assert sum(path.stat().st_size for path in OBEY.rglob("*") if path.is_file()) < 4 << 20
    named = json.loads((OBEY / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == base
