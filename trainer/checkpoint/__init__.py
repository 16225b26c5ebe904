"""Checkpoints: tensors, their hashes, and which checkpoints are complete."""
