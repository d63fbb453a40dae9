"""What a vLLM server imports into its workers, by name (`--worker-extension-cls`), before they load the model.

Importing this module makes the "shm" weight-transfer backend known there: it is the one module of the package that does
something when it is imported, since a worker in another process can be reached in no other way.
"""

from scope_fast.rollout import weight_sync

weight_sync.register()


class WorkerExtension:
    """Adds nothing to vLLM's worker class."""
