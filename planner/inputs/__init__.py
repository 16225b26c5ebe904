"""Inputs of planning: clusters, models and sequence lengths, built in or from the user's files."""
