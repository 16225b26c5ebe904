"""What plans of a run are priced with: calibration, measured memory and tiers."""
