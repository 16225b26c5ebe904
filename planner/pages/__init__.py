"""What people read about plans and runs: words, tables, HTML and traces."""
