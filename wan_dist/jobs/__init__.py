"""Batch runs of a job file: planning, queue, worker, events and run log."""
