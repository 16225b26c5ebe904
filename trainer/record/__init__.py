"""What a run writes to its folder and its screen: metrics, reports, progress lines."""
