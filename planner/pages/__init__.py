"""What users read about plans and runs: text, tables, HTML and traces."""
