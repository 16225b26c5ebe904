"""The ways to plan a step: each is a function of one problem."""
