"""The commands: one module each, run as ``python -m experiments.NAME``."""
