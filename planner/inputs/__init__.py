"""What a dry run is asked about: clusters, models and lengths, from built-in files or the user's own."""
