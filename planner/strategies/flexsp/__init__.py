"""FlexSP: rounds of sequences of like length, groups of several degrees side by side, by a mixed integer program."""
