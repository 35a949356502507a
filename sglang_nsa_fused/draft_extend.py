"""Metadata of a draft extend that runs without a graph: built each step, from one allocation and one launch."""

import dataclasses
from collections.abc import Callable
from types import ModuleType

import torch

from sglang_nsa_fused.kernels import Engine, workspace_sizes
from sglang_nsa_fused.plan import Values
from sglang_nsa_fused.planners import NO_FORM, Planners, ScheduleForm
from sglang_nsa_fused.releases import Release


class DraftExtend:
    """Builds upstream's metadata objects for one step backend. What does not depend on the batch is found once.

    No planner is compared here, where a request waits: what the captures found holds, and beyond it the planners are called.

    Their tables hold what every row may read, its length's prefix; upstream fills the rest of a row with the slots
    behind it.
    """

    @staticmethod
    def not_ours(forward_batch) -> str:
        """Why a draft extend stays upstream's; "" where it does not."""
        if forward_batch.global_num_tokens_cpu is not None:
            return "data-parallel attention pads it"
        if forward_batch.seq_lens_cpu is None:
            return "its lengths are on the GPU alone"
        return "" if any(forward_batch.extend_seq_lens_cpu or ()) else "it has no rows"

    def __init__(self, release: Release, module: ModuleType, planners: Planners, engine: Engine, backend):
        assert engine.draft_extend_plan is not None  # with another engine upstream makes it
        self._backend, self._planners, self._make_plan = backend, planners, engine.draft_extend_plan
        self._page_size = getattr(backend, release.page_size)
        self._draft_tokens = getattr(backend, release.draft_tokens)
        self._req_to_token = getattr(backend, release.req_to_token)
        self._flashmla = getattr(backend, release.decode_impl) == "flashmla_kv"
        try:
            self._num_sms = planners.num_sms() if module.is_cuda() else 0  # 0: no schedule
        except ImportError:  # without deep_gemm upstream has none
            self._num_sms = 0
        topk = getattr(backend, release.index_topk)
        self._values = Values(self._req_to_token, 0, 0, self._draft_tokens, topk, self._page_size, row_floor=release.floor)
        self._plans = {NO_FORM: self._plan(NO_FORM)}  # here, where what does not fit leaves it to upstream
        self._aranges: dict[int, torch.Tensor] = {}
        getattr(backend, release.set_prefill_impl)(forward_batch=None)
        self._state = {name: getattr(backend, name) for name in release.prefill_impl_state}
        self._metadata = getattr(module, release.metadata)
        fields = dataclasses.fields(self._metadata)
        self._same = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        self._same |= {"page_size": self._page_size, "max_seq_len_q": 1}
        self._nsa_cu_lens_q, self._nsa_extend_lens = (f"{release.names}_{n}" for n in ("cu_seqlens_q", "extend_seq_lens_list"))
        _, _, _, self._nsa_lens, self._expanded, self._nsa_cu_lens, _ = release.captured
        of_batch = {"indexer_seq_lens_cpu": "seq_lens_cpu", "indexer_seq_lens": "seq_lens"}  # not in every release
        self._of_batch = [(name, of) for name, of in of_batch.items() if name in self._same]
        self._lens_2d = release.captured_lens_2d
        self._build_plan = getattr(backend, release.build_topk_v2_plan) if release.build_topk_v2_plan else None
        self._v2_schedule = release.v2_schedule
        self._topk_v2_plan = release.topk_v2_plan

    def _plan(self, form: ScheduleForm) -> Callable:
        return self._make_plan(self._values._replace(**form._asdict()), max(self._num_sms, 1))

    def __call__(self, forward_batch):
        """In v2 all requests have num_draft_tokens rows, else upstream takes the batch, in v1 as many as were accepted."""
        extend_lens_cpu = forward_batch.extend_seq_lens_cpu
        is_v2 = forward_batch.forward_mode.is_draft_extend_v2()
        bs, rows = forward_batch.batch_size, sum(extend_lens_cpu)
        if is_v2 and extend_lens_cpu.count(self._draft_tokens) != bs:
            return self._backend._upstreams_draft_extend(forward_batch)
        cols = max(forward_batch.seq_lens_cpu.tolist())  # of a few dozen, a fourth of the time of .max()
        pages = (cols + self._page_size - 1) // self._page_size
        scheduled = self._num_sms and (self._v2_schedule or not is_v2)
        form = self._planners.known_form(rows) if scheduled else NO_FORM

        schedule_size = 0 if form is NO_FORM else 2 * (self._num_sms + 1)
        sizes = workspace_sizes(bs, rows, cols, pages, schedule_size)
        workspace = torch.empty(sum(sizes), dtype=torch.int32, device=self._req_to_token.device)
        generate = self._plans.get(form)
        if generate is None:
            generate = self._plans[form] = self._plan(form)
        generate(
            forward_batch.seq_lens,
            forward_batch.req_pool_indices,
            None if is_v2 else forward_batch.extend_seq_lens,
            bs,
            workspace,
            rows,
            cols,
        )
        planned, table, real_table, cache_lens, cu_lens, expanded, nsa_lens, nsa_cu_lens = workspace.split_with_sizes(sizes)
        flashmla = self._planners.flashmla_for(self._backend, nsa_lens) if self._flashmla else None
        schedule = planned.view(-1, 2) if form is not NO_FORM else None
        if scheduled and schedule is None:
            schedule = self._planners.schedule(expanded, bs)
        arange = self._aranges.get(rows)
        if arange is None:
            arange = self._aranges[rows] = self._backend.get_device_int32_arange(rows + 1)
        # Upstream's frozen dataclass would set its fields one after another, at twice the time of the launch.
        metadata = object.__new__(self._metadata)
        fields = vars(metadata)
        fields.update(
            self._same,
            cache_seqlens_int32=cache_lens,
            max_seq_len_k=cols,
            cu_seqlens_q=arange,
            cu_seqlens_k=cu_lens,
            seq_lens_sum=forward_batch.seq_lens_sum,
            page_table_1=table.view(rows, cols),
            real_page_table=real_table.view(rows, pages),
            flashmla_metadata=flashmla,
            paged_mqa_schedule_metadata=schedule,
        )
        fields[self._nsa_lens] = nsa_lens
        fields[self._nsa_cu_lens_q] = arange
        fields[self._nsa_cu_lens] = nsa_cu_lens
        fields[self._nsa_extend_lens] = extend_lens_cpu
        fields[self._expanded] = expanded
        for name, of in self._of_batch:
            fields[name] = getattr(forward_batch, of)
        if self._lens_2d is not None and schedule is not None:
            fields[self._lens_2d] = expanded.view(-1, 1)
        if self._build_plan is not None:
            fields[self._topk_v2_plan] = self._build_plan(expanded)
        vars(self._backend).update(self._state)
        return metadata
