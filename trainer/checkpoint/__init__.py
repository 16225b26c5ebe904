"""Checkpoints: tensors, their hashes, and which checkpoint is whole."""
