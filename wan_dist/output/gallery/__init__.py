"""Gallery of an output folder: records, contact sheets, tables and an HTML page; imports no torch."""
