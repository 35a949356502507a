"""Upstream's step and multi-step backends without a model, captured and replayed as its graph runners do it.

What differs from release to release is in FORMS; the attributes and the stand-ins for a GPU are in stand_ins.py.
"""

import contextlib
import importlib
import importlib.metadata
import io
import warnings
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Optional

import torch

from sglang_nsa_fused.tools import stand_ins, torch_forms


@dataclass(frozen=True)
class Form:
    """How the graph runners of a release and of those after it call the backends, until the next form."""

    since: str
    names: str  # the prefix of metadata fields, attributes and modules
    classes: tuple[str, str]  # step backend, multi-step backend
    capture: str  # methods of both classes
    replay: str
    extra_backends: int  # step backends of a multi-step backend, beside one for each draft step but the last
    seq_lens: torch.dtype  # of the runners' buffers
    seq_lens_cpu: bool  # whether a replay gets the lengths on the host too
    draft_extend: Optional[str]  # forward mode of the draft extend graph; None where draft extend runs without one
    num_accept_tokens: str  # the field of spec_info with each request's accepted tokens
    spec_info: bool  # whether _precompute_replay_metadata takes it
    draft_schedule: bool  # whether a replay of the draft steps refreshes DeepGEMM's schedule
    ctx_lens_2d: bool  # whether metadata holds the schedule's lengths
    topk_v2_plan: bool


_FORM = Form(
    since="0.5.7",
    names="nsa",
    classes=("NativeSparseAttnBackend", "NativeSparseAttnMultiStepBackend"),
    capture="init_forward_metadata_capture_cuda_graph",
    replay="init_forward_metadata_replay_cuda_graph",
    extra_backends=1,
    seq_lens=torch.int32,
    seq_lens_cpu=True,
    draft_extend="DRAFT_EXTEND",
    num_accept_tokens="accept_length",
    spec_info=True,
    draft_schedule=False,
    ctx_lens_2d=False,
    topk_v2_plan=False,
)
FORMS = [_FORM]
for since, changes in {
    "0.5.9": dict(extra_backends=0),
    "0.5.11": dict(num_accept_tokens="num_accepted_tokens"),
    "0.5.12": dict(num_accept_tokens="num_accept_tokens", draft_schedule=True),
    "0.5.13": dict(
        names="dsa",
        classes=("DeepseekSparseAttnBackend", "DeepseekSparseAttnMultiStepBackend"),
        capture="init_forward_metadata_out_graph",
        replay="init_forward_metadata_out_graph",
        draft_extend=None,
        ctx_lens_2d=True,
    ),
    "0.5.14": dict(seq_lens=torch.int64, spec_info=False),
    "0.5.15": dict(seq_lens_cpu=False, draft_extend="DRAFT_EXTEND_V2", topk_v2_plan=True),
}.items():
    FORMS.append(replace(FORMS[-1], since=since, **changes))


def form_of(version: str) -> Form:
    return [form for form in FORMS if stand_ins.base(form.since) <= stand_ins.base(version)][-1]


class Upstream:
    """The release that `import sglang` finds, imported."""

    def __init__(self, device: str):
        self.device = device
        self.version = importlib.metadata.version("sglang")
        self.form = form_of(self.version)
        if device == "cpu":
            stand_ins.install(self.version)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.module: ModuleType = importlib.import_module(f"sglang.srt.layers.attention.{self.form.names}_backend")
        self.classes = tuple(getattr(self.module, name) for name in self.form.classes)

    def cuda(self, sm100: bool = False):
        """Inside, CUDA branches run, on a CPU over stand-ins."""
        on_cpu = self.device == "cpu"
        return stand_ins.cuda(self.version, self.module, sm100) if on_cpu else contextlib.nullcontext()

    def step_backend(self, req_to_token: torch.Tensor, draft_tokens: int, flashmla: bool = False, cls: type | None = None):
        """req_to_token: int32 [slots, columns]."""
        backend = object.__new__(cls or self.classes[0])
        values = stand_ins.attributes(self.version, self.module, self.device, req_to_token, draft_tokens, flashmla)
        for name, value in values.items():
            setattr(backend, name, value)
        if hasattr(backend, "_init_kpool_metadata_fusion"):  # sets the metadata generators
            backend._init_kpool_metadata_fusion()
        if flashmla and self.device == "cpu":
            backend._compute_flashmla_metadata = torch_forms.flashmla_metadata(self.module)
        return backend

    def multi_step_backend(
        self, req_to_token: torch.Tensor, draft_steps: int, flashmla: bool = False, classes: tuple[type, type] | None = None
    ):
        backend_cls, multi_cls = classes or self.classes
        multi = object.__new__(multi_cls)
        multi.topk = 1
        multi.speculative_num_steps = draft_steps
        count = draft_steps - 1 + self.form.extra_backends
        multi.attn_backends = [self.step_backend(req_to_token, draft_steps + 1, flashmla, backend_cls) for _ in range(count)]
        return multi


class Runner:
    """A graph runner's buffers and calls for one backend: "DECODE" for a multi-step one, else a step backend's modes."""

    def __init__(self, upstream: Upstream, backend, mode: str, max_bs: int, draft_tokens: int):
        self.upstream, self.backend, self.draft_tokens = upstream, backend, draft_tokens
        self.form, self.mode = upstream.form, getattr(upstream.module.ForwardMode, mode)
        self.multi = hasattr(backend, "attn_backends")
        rows = max_bs if mode == "DECODE" else max_bs * draft_tokens
        backend.init_cuda_graph_state(max_bs, rows)
        self.seq_lens = torch.ones(max_bs, dtype=self.form.seq_lens, device=upstream.device)
        self.seq_lens_cpu = torch.ones(max_bs, dtype=self.form.seq_lens)
        self.req_pool_indices = torch.zeros(max_bs, dtype=torch.int64, device=upstream.device)
        self.accepted = torch.full((max_bs,), draft_tokens, dtype=torch.int32, device=upstream.device)

    def step_backends(self) -> list:
        return self.backend.attn_backends if self.multi else [self.backend]

    def capture(self, bs: int) -> None:
        batch = self._batch(bs)
        capture = getattr(self.backend, self.form.capture)
        if self.form.capture == self.form.replay:
            capture(batch, in_capture=True)
        elif self.multi:
            capture(batch)
        else:
            rows = bs if self.mode.is_decode() else bs * self.draft_tokens
            capture(bs, rows, batch.req_pool_indices, batch.seq_lens, None, self.mode, None)

    def replay(self, slots: list[int], lengths: list[int], bs: int, accepted: list[int] | None = None) -> None:
        """lengths: as the forward batch has them, in a draft extend with its new tokens. Rows behind are padding."""
        raw = len(slots)
        self.seq_lens.fill_(1)
        self.seq_lens_cpu.fill_(1)
        self.req_pool_indices.zero_()
        self.accepted.fill_(self.draft_tokens)
        self.seq_lens[:raw] = torch.tensor(lengths)
        self.seq_lens_cpu[:raw] = torch.tensor(lengths)
        self.req_pool_indices[:raw] = torch.tensor(slots)
        if accepted is not None:
            self.accepted[:raw] = torch.tensor(accepted, dtype=torch.int32)
        batch = self._batch(bs)
        if not self.form.seq_lens_cpu:
            batch.seq_lens_cpu = None
        replay = getattr(self.backend, self.form.replay)
        with contextlib.redirect_stdout(io.StringIO()):  # upstream prints on each copy without its CUDA kernel
            if self.form.capture == self.form.replay:
                replay(batch)
            elif self.multi:
                replay(batch, bs)
            else:
                replay(
                    bs=bs,
                    req_pool_indices=self.req_pool_indices,
                    seq_lens=self.seq_lens,
                    seq_lens_sum=batch.seq_lens_sum,
                    encoder_lens=None,
                    forward_mode=self.mode,
                    spec_info=batch.spec_info,
                    seq_lens_cpu=self.seq_lens_cpu,
                )

    def eager(self, slots: list[int], lengths: list[int], counts: list[int]) -> None:
        """Without a graph: `lengths` with the `counts` new tokens of each request."""
        device, backend = self.upstream.device, self.backend
        seq_lens_cpu = torch.tensor(lengths)
        backend.init_forward_metadata(
            SimpleNamespace(
                batch_size=len(slots),
                forward_mode=self.mode,
                req_pool_indices=torch.tensor(slots, device=device),
                req_to_token_pool=SimpleNamespace(req_to_token=backend.req_to_token),  # the batch's own until 0.5.12
                seq_lens=seq_lens_cpu.to(device),
                seq_lens_cpu=seq_lens_cpu,
                seq_lens_sum=sum(lengths),
                extend_seq_lens=torch.tensor(counts, dtype=torch.int32, device=device),
                extend_seq_lens_cpu=counts,
                extend_prefix_lens_cpu=[n - count for n, count in zip(lengths, counts)],
                extend_num_tokens=sum(counts),
                global_num_tokens_cpu=None,
            )
        )

    def _batch(self, bs: int) -> SimpleNamespace:
        return SimpleNamespace(
            batch_size=bs,
            forward_mode=self.mode,
            req_pool_indices=self.req_pool_indices[:bs],
            seq_lens=self.seq_lens[:bs],
            seq_lens_cpu=self.seq_lens_cpu[:bs],
            seq_lens_sum=int(self.seq_lens_cpu[:bs].sum()),
            spec_info=SimpleNamespace(**{self.form.num_accept_tokens: self.accepted[:bs]}),
        )
