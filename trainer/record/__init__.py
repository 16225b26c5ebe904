"""What a run leaves behind: metrics, reports, progress lines."""
