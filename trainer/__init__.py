"""The training run: config, model, data, optimizer, checkpoints and the loop that executes one plan a step."""
