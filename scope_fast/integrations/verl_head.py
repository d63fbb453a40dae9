"""For verl's `external_lib`: registers the "scope" loss and puts our head in the place of verl's Triton one.

    actor_rollout_ref.model.external_lib=scope_fast.integrations.verl_head
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=triton

A module of its own, so that the replacement is asked for by name.
"""

from scope_fast.integrations.verl import patch_fused_head

patch_fused_head()
