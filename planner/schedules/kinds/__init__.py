"""One file per kind of attention, named after it, that holds all there is to it: its ``SCHEDULE``."""
