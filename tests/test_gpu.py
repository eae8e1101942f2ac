"""What can be tested of the GPU code without a GPU: kernel counts, attention arguments, capture."""

import types

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

import grpo
import recode
import rollout
import training.dry_run
import dora
from lib import loading
from lib import speed

VIEWS = """
view reshape expand permute transpose slice select unsqueeze squeeze alias detach t unbind split
""".split()


class Kernels(TorchDispatchMode):
    """Records the names of the operations that are not views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").strip("_")
        if name not in VIEWS and not name.endswith("view"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def decoder(layers, dtype):
    """A decoder in mid-completion: the heads of a 7B model, small widths, DoRA on q and v."""
    config = Qwen2Config(
        vocab_size=97, hidden_size=112, intermediate_size=224, num_hidden_layers=layers,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    speed.prepare(model)
    dora.add_dora(model, 4, 4.0, 0.0, "q_proj,v_proj")
    made = recode.Decoder(model, [list(range(5, 25))], 8)
    made.logits_at(0)
    made.logits_at(1)
    return made


@torch.no_grad()
def count(dtype, drop=False):
    """Kernels of one decoding step of 28 layers, extrapolated from 2 and 4 layers."""
    counts = []
    for layers in (2, 4):
        made = decoder(layers, dtype)
        if drop:
            made.drop_finished(torch.arange(8) < 3)
            made.step()
        with Kernels() as kernels:
            made.step()
        counts.append(len(kernels.names))
        assert not {"local_scalar_dense", "nonzero"} & set(kernels.names)
    per_layer = (counts[1] - counts[0]) // 2
    return counts[0] + 26 * per_layer


@pytest.mark.parametrize("drop", [False, True], ids=["all rows", "after a drop"])
def test_kernels_of_a_decoding_step(drop, monkeypatch):
    """Stops a decoding step whose kernel launches take longer than reading the weights.

    It must not wait for the GPU either. Counted in bf16 on a CPU, whose builds have no CUDA
    kernels: each fused kernel is replaced by a single operation.
    """
    one = lambda x, *args, **kwargs: torch.zeros_like(x)
    fused = types.SimpleNamespace(
        **vars(F) | {"scaled_dot_product_attention": one, "rms_norm": one}
    )
    monkeypatch.setattr(recode, "F", fused)
    monkeypatch.setattr(speed, "F", fused)
    assert count(torch.bfloat16, drop) <= 1000


def test_operations_of_a_decoding_step_on_a_cpu():
    """Stops the decoding step from growing on a CPU: at 8 rows half of its time is dispatch."""
    assert count(torch.float32) <= 1250


def test_training_attention_has_no_mask_and_no_repeated_keys(monkeypatch):
    """Stops a mask from disabling the flash kernel in training, and keys copied to every head."""
    seen = []

    def note(query, key, value, *args, **kwargs):
        seen.append((query.shape[1], key.shape[1], kwargs))
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    noted = types.SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": note})
    monkeypatch.setattr(recode, "F", noted)
    model = dora.add_dora(random_model("qwen2"), 4, 4.0, 0.0, "q_proj,v_proj")
    group = rollout.Group([5, 6, 7], None, [[8, 9, 3], [10, 3]])
    batch = rollout.make_batch([group], torch.randn(1, 2), "cpu")
    grpo.accumulate(model, batch, grpo.Config(beta=0.0))
    assert len(seen) == 4 and {(heads, keys) for heads, keys, _ in seen} == {(4, 2)}
    for _, _, settings in seen:
        assert settings["enable_gqa"]
        bias = settings.get("attn_mask")
        assert settings.get("is_causal") or isinstance(bias, torch.nn.attention.bias.CausalBias)


def test_a_failed_capture_restores_the_stream(monkeypatch):
    """Stops a failed capture from leaving its side stream as the current stream."""
    streams = ["main"]

    class Graph:
        def __enter__(self):
            streams[0] = "side"

        def __exit__(self, *_):
            raise RuntimeError("capture failed")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: Graph())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.__setitem__(0, stream))
    with pytest.raises(RuntimeError, match="capture failed"):
        speed.capture(lambda: None)
    assert streams == ["main"]


def test_cudnn_attention_is_off_where_a_model_is_loaded(checkpoints):
    """Stops NaN gradients of cuDNN's attention (pytorch#196678) in training."""
    loading.load_model(checkpoints["qwen2"])
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_fused_norm_equals_the_models_own():
    """Stops the fused RMSNorm from differing from the model's own norm, or changing other models'.

    The change was once made to the class, so a model of TRL ran our norm in the benchmark.
    """
    model = random_model("llama")
    speed.prepare(model)
    assert "forward" not in vars(random_model("llama").model.norm)
    x = torch.randn(3, 5, 64)
    layer = model.model.norm
    expected = (
        layer.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.variance_epsilon)
    )
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)


def test_a_dry_run_measures_its_own_peak(monkeypatch, capsys):
    """Stops --dry-run from reporting the peak of loading the model instead of its step's."""
    events = []

    def sample(*args):
        events.append("sample")
        return torch.ones(2, 3, dtype=torch.long), None, None

    def peak(device):
        events.append("read")
        return 7e9 if "sample" in events else 2e9

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 8e9)
    monkeypatch.setattr(recode, "sample", sample)
    monkeypatch.setattr(rollout, "make_batch", lambda *args: None)
    model = types.SimpleNamespace(device=torch.device("cuda"), modules=list)
    config = grpo.Config(num_samples=2, max_new_tokens=3)
    training.dry_run.dry_run(model, [([5, 6], None)], None, config, lambda *args: None)
    assert events[0] == "reset" and events[1:] == ["read", "sample", "read"]
    out = capsys.readouterr().out
    assert "peak 7.00 GB; before the step 2.00 GB" in out and "reserved by torch 8.00 GB" in out
