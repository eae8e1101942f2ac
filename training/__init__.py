"""Around the training loop: set-up and checks, the run directory, the screen, the dry run."""
