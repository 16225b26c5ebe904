"""The command line and the processes it starts: environment, local launch, calibration, health checks."""
