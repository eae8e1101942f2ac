"""Run by hand: python -m tools.NAME."""
