"""FlexSP: rounds of sequences of like length; in each a mixed-integer program chooses groups of several degrees."""
