"""Wan video VAEs 2.1 and 2.2, for one device."""
