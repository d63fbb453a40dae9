"""The five ops: a file per stem (schema, fake, autograd), `reference` (plain PyTorch) and `dispatch` (backends)."""
