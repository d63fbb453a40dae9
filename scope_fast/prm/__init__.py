"""Process reward models: a probability for every step."""
