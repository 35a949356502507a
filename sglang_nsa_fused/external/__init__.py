"""Loads the plugin where nothing else does: SGLANG_EXTERNAL_MODEL_PACKAGE=sglang_nsa_fused.external.

sglang's model registry imports this package before a model is loaded, so before any attention backend is made.
"""

from sglang_nsa_fused.plugin import activate

activate(direct=True)
