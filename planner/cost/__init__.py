"""What work costs on a machine: coefficients from data sheets or measurements, and the limits of a plan."""
