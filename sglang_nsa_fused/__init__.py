"""SGLang plugin: refreshes the sparse-attention metadata of speculative decoding in one kernel launch."""

__version__ = "0.2.0"

__all__ = ["Destination", "ReplayPlan", "Values", "fused_metadata_copy_cuda", "fused_metadata_copy_multi_cuda"]


def __getattr__(name):  # lazy: sglang imports this package in every process, also where the plugin is off
    if name in ("Destination", "ReplayPlan", "Values"):
        from sglang_nsa_fused import plan

        return getattr(plan, name)
    if name in __all__:
        from sglang_nsa_fused import kernels

        return getattr(kernels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
