"""One file per kind of attention, named after it, with all of its code: its ``SCHEDULE``."""
