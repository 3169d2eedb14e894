"""Files of results: videos, records, locks of their names, and the gallery that shows them."""
