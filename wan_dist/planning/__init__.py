"""What a run will do and how much memory it will take, from sizes alone; no torch."""
