"""What a batch of videos made, to look at: records, contact sheets, a table and a page; no torch."""
