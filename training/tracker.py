"""--log-to: the metrics for TensorBoard or Weights & Biases."""

import importlib
import secrets
from pathlib import Path
from types import SimpleNamespace

from lib.config import BadInput, first_line
from lib.files import write


def import_tracker(name):
    """The module behind --log-to; BadInput if it cannot be imported."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise BadInput(f"--log-to {name}: it is not installed; pip install {name}")


def open_tracker(config, step):
    """An object with log(row) and close(); a resumed run logs steps again, from `step` on."""
    module = import_tracker(config.log_to)
    path = Path(config.output) / config.log_to
    if config.log_to == "tensorboard":
        writer = module.SummaryWriter(path, purge_step=step)  # drops later rows

        def log(row):
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name, value, row["step"])
            writer.flush()

        return SimpleNamespace(log=log, close=writer.close)

    if not (path / "id").is_file():
        write(path / "id", secrets.token_hex(4).encode())
    more = {"id": (path / "id").read_text(), "resume": "allow", "allow_val_change": True}
    try:
        server = module.init(project="recode", dir=path.parent, config=vars(config), **more)
    except module.Error as error:
        raise BadInput(f"--log-to wandb: {first_line(error)}; or set WANDB_MODE=offline")
    server.define_metric("*", step_metric="step")  # a repeated step stays at its place
    return SimpleNamespace(log=server.log, close=server.finish)
