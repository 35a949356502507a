"""The indexer's logits of all rows in one call of DeepGEMM.

From 0.5.20 on upstream calls it for as many rows at a time as the GPU has SMs, and copies the results together: SM100 takes no
more. SM90 does, and a row of logits is as wide as the context.
"""

import functools

from sglang_nsa_fused.replay import Kept
from sglang_nsa_fused.start_check import lacking

METHOD = "_get_topk_paged"
PARAMETERS = ("self", "forward_batch", "layer_id", "q_fp8", "weights", "metadata")


def give_all_rows(cls) -> None:
    """Wraps the method of upstream's Indexer. Raises Kept where it is another than the one that is known."""
    if lacking(cls, METHOD, PARAMETERS):
        raise Kept(f"sglang was changed: expected {cls.__module__}.Indexer.{METHOD}({', '.join(PARAMETERS)}); reinstall sglang")
    original = getattr(cls, METHOD)

    @functools.wraps(original)
    def in_one_call(self, forward_batch, layer_id, q_fp8, weights, metadata):
        sms = self.sm_count
        # Without a schedule of all rows upstream makes one, for this number of SMs.
        if getattr(metadata, "paged_mqa_schedule_metadata", None) is not None:
            self.sm_count = max(sms, len(q_fp8))
        try:
            return original(self, forward_batch, layer_id, q_fp8, weights, metadata)
        finally:
            self.sm_count = sms

    setattr(cls, METHOD, in_one_call)
