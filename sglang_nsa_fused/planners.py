"""What the installed deep_gemm and flash_mla plan for lengths, and whether our kernel may write it in their place.

Decided at capture, by comparison with the installed functions over vectors of lengths, never from version numbers.
"""

import functools
import itertools
import logging
import math
from types import ModuleType
from typing import Callable, NamedTuple, Optional

import torch

from sglang_nsa_fused import reference
from sglang_nsa_fused.kernels import Engine
from sglang_nsa_fused.plan import Destination, ReplayPlan, Values
from sglang_nsa_fused.releases import Release

logger = logging.getLogger("sglang_nsa_fused")


class ScheduleForm(NamedTuple):
    """A DeepGEMM's way to schedule, see `Values`."""

    segment_len: int
    extra_last: bool


NO_FORM = ScheduleForm(0, False)
# 256 on SM90; the rest for other kernels.
SCHEDULE_FORMS = tuple(ScheduleForm(*form) for form in itertools.product((256, 128, 512, 64, 1024), (False, True)))
LONGEST = 1 << 18
POISON = -7
# Of the top-k v2, (threshold, most rows): up to 0.5.20, then Hopper's and Blackwell's.
TOPK_BUCKETS = (
    ((65536, 30), (98304, 48), (131072, 60), (196608, 80), (262144, 112), (393216, 128)),
    ((65536, 30), (98304, 45), (131072, 60), (196608, 80), (262144, 112), (393216, 128)),
    ((32768, 48), (131072, 66), (163840, 99), (196608, 132), (262144, 198), (393216, 231), (524288, 264)),
)


class Planners:
    """Both planners of one process; each finding is made once for a number of rows and said once."""

    def __init__(self, release: Release, module: ModuleType, engine: Engine):
        self._release, self._module = release, module
        self._engine = engine
        self._schedule_forms: dict[int, ScheduleForm] = {}
        self._flashmla: dict[tuple, object] = {}
        self._flashmla_by_rows: dict[tuple, object] = {}
        self._topk_buckets: dict[int, Optional[tuple]] = {}
        self._said: set[str] = set()

    @functools.cached_property
    def _deep_gemm(self) -> tuple[Callable, Callable]:
        """(get_paged_mqa_logits_metadata, get_num_sms), as upstream finds them."""
        release, module = self._release, self._module
        if release.schedule_function is not None and release.num_sms is not None:
            return getattr(module, release.schedule_function)(), getattr(module, release.num_sms)
        import deep_gemm

        return deep_gemm.get_paged_mqa_logits_metadata, deep_gemm.get_num_sms

    def num_sms(self) -> int:
        return self._deep_gemm[1]()

    def schedule(self, lengths: torch.Tensor, bs: int) -> torch.Tensor:
        """DeepGEMM's own paged MQA schedule, int32 [num_sms + 1, 2], for int32 lengths [rows] and pages of 64 tokens."""
        to_2d = self._release.context_lens_2d
        return self.schedule_of(getattr(self._module, to_2d)(lengths, bs) if to_2d else lengths)

    def schedule_of(self, context_lens: torch.Tensor) -> torch.Tensor:
        """The same for lengths in the form that this release hands to DeepGEMM."""
        return self._deep_gemm[0](context_lens, 64, self.num_sms())

    def schedule_form(self, rows: int, device: str) -> ScheduleForm:
        """The form in which our schedule is DeepGEMM's for so many rows; NO_FORM: in none, use theirs."""
        if rows not in self._schedule_forms:
            expected = [(lengths, self.schedule(lengths, rows)) for lengths in length_vectors(rows, device)]
            found = (form for form in SCHEDULE_FORMS if all(self._matches(form, *pair) for pair in expected))
            self._schedule_forms[rows] = next(found, NO_FORM)
            if self._schedule_forms[rows] is NO_FORM:
                self._say("deep_gemm's schedule has a form that this plugin does not know; deep_gemm is called for it")
        return self._schedule_forms[rows]

    def known_form(self, rows: int) -> ScheduleForm:
        """As `schedule_form`, from what was compared before, since a server cannot wait for 72 plans: row counts between two
        that were compared have the form that all of those have."""
        form, compared = self._schedule_forms.get(rows), self._schedule_forms
        if form is None and compared and min(compared) < rows < max(compared) and len(set(compared.values())) == 1:
            form = next(iter(compared.values()))
        return NO_FORM if form is None else form

    def _matches(self, form: ScheduleForm, lengths: torch.Tensor, expected: torch.Tensor) -> bool:
        if expected.dtype != torch.int32 or expected.dim() != 2 or expected.shape[1] != 2 or len(expected) < 2:
            return False
        rows, device = len(lengths), lengths.device
        schedule = torch.full_like(expected, -1)
        slots = torch.zeros(rows, dtype=torch.int64, device=device)
        values = Values(slots.int().view(1, -1), rows, rows, 1, 1, 64, *form)
        plan = ReplayPlan(reference.DECODE, [Destination(paged_mqa_schedule=schedule)], self._engine, values)
        plan.generate(lengths, slots, None, rows)
        return torch.equal(schedule, expected)

    def flashmla(self, backend, rows: int):
        """FlashMLA's plan for so many rows, where it is the same for all lengths, as it is with a top k; else None."""
        key = (rows, getattr(backend, self._release.flashmla_heads))
        if key not in self._flashmla:
            plans = [self.flashmla_of(backend, lengths) for lengths in length_vectors(rows, backend.device)]
            alike = all(_same_plan(plans[0], plan) for plan in plans[1:])
            self._flashmla[key] = plans[0] if alike else None
            if not alike:
                self._say("flash_mla's metadata depends on the lengths; flash_mla is called for it")
        return self._flashmla[key]

    def flashmla_for(self, backend, lengths: torch.Tensor):
        """FlashMLA's own plan for int32 lengths [rows]: asked for once for so many rows, where every comparison before found
        that it depends on nothing else."""
        key = (len(lengths), getattr(backend, self._release.flashmla_heads))
        plan = self._flashmla.get(key) or self._flashmla_by_rows.get(key)
        if plan is None:
            plan = self.flashmla_of(backend, lengths)
            if self._flashmla and None not in self._flashmla.values():
                self._flashmla_by_rows[key] = plan
        return plan

    def flashmla_of(self, backend, lengths: torch.Tensor):
        """FlashMLA's own plan for int32 lengths [rows], already clamped to the index's top k by the caller."""
        clamped = lengths.clamp(max=getattr(backend, self._release.index_topk))
        return backend._compute_flashmla_metadata(cache_seqlens=clamped, seq_len_q=1)

    def topk_buckets(self, backend, rows: int) -> Optional[tuple]:
        """The buckets with which our plan of the top-k is upstream's for so many rows; none of them where upstream leaves
        the plan of so many rows unwritten, and reads none; None: use theirs."""
        if rows not in self._topk_buckets:
            assert self._release.build_topk_v2_plan is not None  # nobody else asks
            build = getattr(backend, self._release.build_topk_v2_plan)
            vectors = bucket_vectors(rows, backend.device)
            expected = [(lengths.cpu(), _built_over_poison(build, lengths)) for lengths in vectors]
            found = (b for b in ((), *TOPK_BUCKETS) if all(_same_topk_plan(b, *pair) for pair in expected))
            self._topk_buckets[rows] = next(found, None)
            if self._topk_buckets[rows] is None:
                self._say("the plan of the top-k has a form that this plugin does not know; upstream's planner is called")
        return self._topk_buckets[rows]

    def _say(self, finding: str) -> None:
        if finding not in self._said:
            self._said.add(finding)
            logger.warning("sglang-nsa-fused: %s", finding)


def _same_plan(a, b) -> bool:
    # Columns 5 to 7 of the tile metadata are padding that FlashMLA leaves as the allocator had it.
    return torch.equal(a.num_splits, b.num_splits) and torch.equal(a.flashmla_metadata[:, :5], b.flashmla_metadata[:, :5])


def _built_over_poison(build: Callable, lengths: torch.Tensor) -> torch.Tensor:
    """The plan, on the host, in memory that the allocator has just got back full of POISON."""
    poison = torch.full((len(lengths) + 1, 2), POISON, dtype=torch.int32, device=lengths.device)
    del poison
    return build(lengths).cpu()


def _same_topk_plan(buckets: tuple, lengths: torch.Tensor, plan: torch.Tensor) -> bool:
    """Whether upstream's plan, whose rows come in any order, is that of these buckets; of none: unwritten."""
    if not buckets:
        return bool((plan == POISON).all())
    expected = reference.topk_v2_plan(lengths, buckets)
    found = plan[: len(expected)].tolist()
    return found[:1] == expected[:1].tolist() and sorted(found[1:]) == expected[1:].tolist()


def bucket_vectors(rows: int, device: str) -> list[torch.Tensor]:
    """int32 vectors [rows] at every threshold: with one longer row, as many as its bucket takes, one more, and all; and
    mixed ones."""
    generator = torch.Generator().manual_seed(rows)
    vectors = []
    for threshold, most in sorted({bucket for known in TOPK_BUCKETS for bucket in known}):
        for count in sorted({min(count, rows) for count in (0, 1, most, most + 1, rows)}):
            lengths = torch.full((rows,), threshold)
            lengths[torch.randperm(rows, generator=generator)[:count]] += 1
            vectors.append(lengths)
    vectors += [(2 ** (torch.rand(rows, generator=generator) * 21)).long() for _ in range(8)]
    return list(torch.stack(vectors).to(torch.int32).to(device))


def length_vectors(rows: int, device: str) -> list[torch.Tensor]:
    """72 int32 vectors [rows]: equal lengths at powers of two and beside block boundaries, mixed ones, some with zeros.

    None is of zeros alone: DeepGEMM from 0.1.4 on then reads past its shared memory where the rows fill blocks of 32.
    """
    generator = torch.Generator().manual_seed(rows)
    equal = {1 << power for power in range(19)} | {n + d for n in (64, 128, 256, 512, 2048, 65536) for d in (-1, 1)}
    vectors = [torch.full((rows,), length) for length in sorted(equal)]
    while len(vectors) < 72:
        exponent = torch.rand(rows, generator=generator) * math.log2(LONGEST)
        mixed = (2**exponent).long()
        if len(vectors) % 4 == 0:
            mixed[1:][torch.rand(rows - 1, generator=generator) < 0.3] = 0
        vectors.append(mixed)
    return list(torch.stack(vectors).to(torch.int32).to(device))
