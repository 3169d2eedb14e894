"""Distributed execution: process groups, collectives, and one file per parallelism strategy."""
