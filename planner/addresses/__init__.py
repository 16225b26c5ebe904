"""Static memory: addresses for every buffer, and the fractions of activations to swap."""
