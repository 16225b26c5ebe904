"""The training run: settings, model, data, optimizer, checkpoints and the loop that executes one plan per step."""
