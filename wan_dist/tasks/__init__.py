"""What each task takes and makes, and images as people have them; no torch."""
