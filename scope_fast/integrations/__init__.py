"""Drop-ins for trainers people already have: trl, verl, and callers of Liger's fused GRPO loss.

Each module imports its peer when it is imported itself, and says so in one line where the peer is missing or is not
the version it was written against. Nothing here is imported by the rest of the package.
"""
