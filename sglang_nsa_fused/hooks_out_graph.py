"""From sglang 0.5.13 on: one method captures and replays, and a step backend builds metadata for a new batch size."""

from sglang_nsa_fused import backends
from sglang_nsa_fused.replay import mode_of


class StepBackend(backends.StepBackend):
    def _build_forward_metadata_cuda_graph(self, bs, num_tokens, req_pool_indices, seq_lens, seq_lens_cpu, forward_mode,
                                           *args, **kwargs):  # fmt: skip
        super()._build_forward_metadata_cuda_graph(
            bs, num_tokens, req_pool_indices, seq_lens, seq_lens_cpu, forward_mode, *args, **kwargs
        )
        self._captured(bs, forward_mode)

    def _apply_cuda_graph_metadata(self, bs, req_pool_indices, seq_lens, seq_lens_cpu, forward_mode, spec_info,
                                   *args, **kwargs):  # fmt: skip
        replay = self._replays.get(bs)
        # A batch in another mode than captured upstream's method serves by that mode.
        if replay is None or not replay.generates or mode_of(forward_mode) != replay.mode:
            return super()._apply_cuda_graph_metadata(
                bs, req_pool_indices, seq_lens, seq_lens_cpu, forward_mode, spec_info, *args, **kwargs
            )
        replay.generate(seq_lens, req_pool_indices, replay.extend_lens(spec_info), bs)


class MultiStepBackend(backends.MultiStepBackend):
    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False):
        upstream, bs = super().init_forward_metadata_out_graph, forward_batch.batch_size
        if in_capture:
            self._capture(lambda: upstream(forward_batch, in_capture=True), bs)
        else:
            self._replay(lambda: upstream(forward_batch), forward_batch, bs)
