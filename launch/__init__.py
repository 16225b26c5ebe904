"""The command line and the processes behind it: environment, local launch, calibration, health checks."""
