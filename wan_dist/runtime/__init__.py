"""Errors, logs, files, signals and the environment of the process."""
