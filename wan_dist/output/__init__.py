"""Result files: videos, records, locks of result names, and the gallery."""
