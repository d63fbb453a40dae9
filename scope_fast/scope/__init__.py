"""The method: pure functions on tokens, probabilities and rewards. Knows no engine, no learner, no process group."""
