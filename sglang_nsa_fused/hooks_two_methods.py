"""Up to sglang 0.5.12: a graph runner captures with one method and replays with another."""

from sglang_nsa_fused import backends


class StepBackend(backends.StepBackend):
    def init_forward_metadata_capture_cuda_graph(
        self, bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
    ):
        super().init_forward_metadata_capture_cuda_graph(
            bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
        )
        self._captured(bs, forward_mode)

    # The last of upstream's parameters differ between releases and none of them is read here: they are handed on.
    def init_forward_metadata_replay_cuda_graph(
        self, bs, req_pool_indices, seq_lens, seq_lens_sum, encoder_lens, forward_mode, spec_info, seq_lens_cpu,
        *args, **kwargs,
    ):  # fmt: skip
        replay = backends.captured(self._replays, bs)
        if replay is None or not replay.generates:
            return super().init_forward_metadata_replay_cuda_graph(
                bs, req_pool_indices, seq_lens, seq_lens_sum, encoder_lens, forward_mode, spec_info, seq_lens_cpu,
                *args, **kwargs,
            )  # fmt: skip
        backends.check_mode(replay, forward_mode)
        replay.generate(seq_lens, req_pool_indices, replay.extend_lens(spec_info), bs)


class MultiStepBackend(backends.MultiStepBackend):
    def init_forward_metadata_capture_cuda_graph(self, forward_batch):
        upstream = super().init_forward_metadata_capture_cuda_graph
        self._capture(lambda: upstream(forward_batch), forward_batch.batch_size)

    def init_forward_metadata_replay_cuda_graph(self, forward_batch, bs: int):
        upstream = super().init_forward_metadata_replay_cuda_graph
        self._replay(lambda: upstream(forward_batch, bs), forward_batch, bs)
