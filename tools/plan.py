"""The memory that a run needs on GPUs, by formula: a table for Qwen2.5-Coder.

    python -m tools.plan
    python grpo.py --model Qwen/Qwen2.5-Coder-7B-Instruct --dry-run

A row of the table is grpo.py at its defaults, with a prompt of 2,048 tokens and layers recomputed.
--dry-run measures such a step on your machine; its peak includes the process itself, which the
formula (training/memory.py, eq. 6) leaves out.
"""

from types import SimpleNamespace

import grpo
from lib import parallel
from lib.config import Parser
from tasks.table import markdown
from training.memory import memory

SIZES = {  # Qwen2.5-Coder: d, n, f, q, k, V, whether input and output layer share their weights
    "0.5B": (896, 24, 4864, 896, 128, 151_936, True),
    "1.5B": (1536, 28, 8960, 1536, 256, 151_936, True),
    "7B": (3584, 28, 18_944, 3584, 512, 152_064, False),
    "14B": (5120, 48, 13_824, 5120, 1024, 152_064, False),
    "32B": (5120, 64, 27_648, 5120, 1024, 152_064, False),
}


def shape(d, n, f, q, k, V, tied, rank=64):
    """A model's letters in the equations, with a DoRA on q_proj and v_proj."""
    W = n * (2 * d * q + 2 * d * k + 3 * d * f) + V * d * (1 if tied else 2)
    A = n * (rank * (2 * d + q + k) + q + k)
    return SimpleNamespace(d=d, n=n, f=f, k=k, V=V, W=W, A=A, m=0)


def main(argv=None):
    """Print the peak memory per GPU of the largest step, one prompt per GPU. Returns 0."""
    Parser(__doc__).parse_args(argv)
    full = grpo.Config(adapter="none", beta=0.0)
    columns = ((grpo.Config(), 1), (full, 1), (full, 2), (full, 8))
    lines = [["", "DoRA, any number of GPUs", "full, 1 GPU", "full, 2 GPUs", "full, 8 GPUs"]]
    for name, size in SIZES.items():
        peaks = [memory(shape(*size), config, 2048, 1, N)["peak"] for config, N in columns]
        lines.append([name, *(f"{peak / 1e9:.0f} GB" for peak in peaks)])
    print("prompt of 2,048 tokens, 8 answers of 1,024, bf16: peak memory per GPU\n")
    print(markdown(lines), end="")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
