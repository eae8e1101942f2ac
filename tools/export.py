"""Merges a run's adapter into its base model: an ordinary checkpoint, for vLLM and others.

    python -m tools.export runs/grpo --output merged
"""

from pathlib import Path

import safetensors

from training import loading, parallel
from training.config import BadInput, Parser


def main(argv=None):
    """Export a run. The exit status is 0."""
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, e.g. runs/grpo")
    parser.add_argument("--output", required=True, metavar="X", help="new directory (required)")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise BadInput(f"--output {output}: exists and is not empty; give a new directory")
    base, adapter, _ = loading.open_policy(args.run)
    if not adapter:
        raise BadInput(f"{args.run}: no adapter there; give a run directory, e.g. runs/grpo")
    try:
        loading.export(base, adapter, args.output)
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise BadInput(f"cannot export {args.run}: {loading.first_line(error)}")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
