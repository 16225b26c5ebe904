"""The decoder, its initial weights and its optimizer."""
