"""--log-to: the metrics for TensorBoard or Weights & Biases, which are optional packages."""

import secrets
from pathlib import Path
from types import SimpleNamespace

from lib.config import BadInput, first_line
from lib.files import write


def open_tracker(config, step):
    """An object with log(row) and close(); a resumed run logs steps again, from `step` on."""
    path = Path(config.output) / config.log_to
    if config.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(path, purge_step=step)  # drops later rows

        def log(row):
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name, value, row["step"])
            writer.flush()

        return SimpleNamespace(log=log, close=writer.close)

    import wandb

    if not (path / "id").is_file():
        write(path / "id", secrets.token_hex(4).encode())
    more = {"id": (path / "id").read_text(), "resume": "allow", "allow_val_change": True}
    try:
        server = wandb.init(project="recode", dir=path.parent, config=vars(config), **more)
    except wandb.Error as error:
        raise BadInput(f"--log-to wandb: {first_line(error)}; or set WANDB_MODE=offline")
    server.define_metric("*", step_metric="step")  # a repeated step stays at its place
    return SimpleNamespace(log=server.log, close=server.finish)
