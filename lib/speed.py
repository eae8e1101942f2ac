"""What only makes things faster: fused norms, threads and memory, packed weights, CUDA graphs.

Delete this file and the five lines that call it: results stay, up to rounding.
"""

import contextlib
import ctypes
import functools
import platform
import sys

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lib import fsdp
from lib.config import first_line

LARGE = 100_000_000  # parameters of a model whose speed on a CPU is worth memory
SMALL = 2_000_000  # parameters of a model that more threads make slower on a busy CPU


def prepare(model):
    """Fuse the norms of a loaded model; on a CPU, choose threads and memory by its size."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm | Qwen2RMSNorm | Qwen3RMSNorm):
            module.forward = functools.partial(fused_rms_norm, module)
    size = model.num_parameters()
    if model.device.type == "cpu" and size < SMALL:
        torch.set_num_threads(1)
    if model.device.type == "cpu" and size > LARGE:
        keep_freed_memory()


def fused_rms_norm(self, x):
    """RMSNorm as one kernel; the model's own takes six, and rounds more in bf16."""
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def keep_freed_memory():
    """Make glibc keep freed memory; page faults would be a quarter of a large model's step."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: only blocks over 1 GiB are unmapped when freed
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: give back what exceeds 2 GiB at the top
        mallopt(-2, 1 << 26)  # M_TOP_PAD: grow by 64 MiB


@contextlib.contextmanager
def packed_weights(model):
    """Give the linear layers of a large model on a CPU copies of their weights packed by oneDNN.

    Sampling reads all weights at every token, and reads packed ones 1.5 to 3 times as fast.
    """
    able = torch.backends.mkldnn.is_available()
    if model.dtype == torch.bfloat16:
        able = able and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    large = LARGE < model.num_parameters() < 8e9 / model.dtype.itemsize  # at most 8 GB of copies
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.is_cpu]
    with contextlib.ExitStack() as stack:  # the copies are freed before training needs memory
        for layer in linear if large and able else ():
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 8)  # for 8 rows
            args = {"W": weight, "B": layer.bias, "attr": "none", "scalars": [], "algorithm": ""}
            layer.forward = functools.partial(torch.ops.mkldnn._linear_pointwise, **args)
            stack.callback(delattr, layer, "forward")
        yield


def capture(step):
    """Capture step() as a CUDA graph: a function that replays it, and the tensor that it fills."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            out = step()
    finally:  # a failed capture leaves its own stream as the current one
        torch.cuda.set_stream(stream)
    return graph.replay, out


@functools.cache
def warn_once(problem):
    print(f"warning   {problem}; decoding without graphs is much slower", file=sys.stderr)


def capture_and_check(model, step, expected):
    """capture(step) if it reproduces the logits `expected`, else (None, None) and a warning."""
    try:
        with fsdp.unhooked(model):
            replay, logits = capture(step)
        replay()
        found = logits.float().nan_to_num()
        expected = expected.float().nan_to_num()
        if (found - expected).norm() <= 0.05 * expected.norm():  # bf16 kernels: 0.02
            return replay, logits
        warn_once("a CUDA graph gave other logits")
    except RuntimeError as error:
        warn_once(f"no CUDA graph: {first_line(error)}")
    return None, None
