"""One file for each kind of attention, named after it, that holds all there is to it: its ``SCHEDULE``."""
