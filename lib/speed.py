"""A step of decoding as a CUDA graph: one launch in place of a thousand kernels."""

import sys

import torch

from lib import fsdp
from lib.config import first_line


def capture(step):
    """step() as a CUDA graph: a function that replays it, and the tensor that it fills."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            out = step()
    finally:  # a failed capture leaves its own stream as the current one
        torch.cuda.set_stream(stream)
    return graph.replay, out


def capture_and_check(model, step, expected):
    """step() as a CUDA graph, which must reproduce the logits that it gave eagerly, `expected`.

    Returns (replay, the tensor that it fills); (None, None), and a warning, where that fails.
    """
    try:
        with fsdp.unhooked(model):
            replay, logits = capture(step)
        replay()
        found = logits.float().nan_to_num()
        expected = expected.float().nan_to_num()
        if (found - expected).norm() <= 0.05 * expected.norm():  # bf16 kernels: 0.02
            return replay, logits
        problem = "a CUDA graph gave other logits"
    except RuntimeError as error:
        problem = f"no CUDA graph: {first_line(error)}"
    print(f"warning   {problem}; decoding without graphs is much slower", file=sys.stderr)
    return None, None
