"""Run planning: what a run will do and how much memory it takes, from sizes alone; no torch."""
