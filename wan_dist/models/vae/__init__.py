"""The Wan video VAEs."""
