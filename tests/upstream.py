"""Upstream's real classes for the tests, with the plugin off and on."""

import dataclasses
import gc

import torch

from sglang_nsa_fused import backends, planners, plugin
from sglang_nsa_fused.settings import Settings
from sglang_nsa_fused.tools import bare, refresh

SETTINGS = Settings(enabled=True, required=False, allowlist=None)
WIDE = dataclasses.replace(SETTINGS, keep_wide_table=True)
CAPTURE_BS = [1, 2, 4, 8]
LONGEST = 3100  # an odd number of pages


class Upstream:
    def __init__(self, device):
        self.release, self.version = plugin.find_release()
        self.module = bare.import_upstream(self.release, device)
        plugin.import_backend(self.release)
        self.classes = getattr(self.module, self.release.backend), getattr(self.module, self.release.multi_step)
        self.device = device

    def gpu(self, sm100=False):
        return bare.gpu(self.release, self.device, sm100)

    def schedule(self, lengths):
        """DeepGEMM's own for these lengths of rows."""
        return planners.Planners(self.release, self.module, None).schedule(lengths.to(torch.int32), len(lengths))

    def fused(self, settings=SETTINGS):
        return backends.subclasses(self.release, self.module, self.version, settings)

    def multi(self, classes, draft_steps, flashmla=False):
        width = LONGEST + draft_steps + 1
        table = torch.randperm(17 * width, generator=torch.Generator().manual_seed(0)).to(torch.int32).view(17, width)
        args = (self.release, self.device, table.to(self.device), draft_steps, CAPTURE_BS, flashmla)
        return bare.multi_step_backend(classes, *args)

    def graphs(self, mode, draft_tokens, flashmla=False, settings=SETTINGS):
        """A step backend captured in this ForwardMode, off and on."""
        width = LONGEST + (draft_tokens or 0) + 1
        table = torch.randperm(17 * width, generator=torch.Generator().manual_seed(0)).to(torch.int32).view(17, width)
        args = (self.module, self.release, self.device, table.to(self.device), draft_tokens, mode, CAPTURE_BS, flashmla)
        return [bare.graph_backend(cls, *args) for cls in (self.classes[0], self.fused(settings)[0])]


def batches(count=40):
    """Requests as a server has them: (slots, lengths, the captured batch size)."""
    for slots, lengths in refresh.requests(count, most=CAPTURE_BS[-1], longest=LONGEST):
        yield slots, lengths, next(size for size in CAPTURE_BS if size >= len(slots))


def steps(upstream, off, on, count=40):
    """Replays the same requests on both sides; yields (bs, live lengths) after each."""
    for slots, lengths, bs in batches(count):
        for multi in (off, on):
            bare.replay(multi, bare.forward_batch(multi, slots, lengths, bs))
        yield bs, torch.tensor(lengths + [1] * (bs - len(lengths)), device=upstream.device)


def after(replay):
    """What follows the launch."""
    return [refresh.__name__ for refresh in replay._after]


def stale_fields(release, draft_steps, number):
    """What upstream leaves as it was captured in step backend `number`."""
    stale = set() if release.draft_schedule else {"paged_mqa_schedule_metadata"}
    return stale | ({"paged_mqa_schedule_metadata", "topk_v2_plan"} if draft_steps > 3 and number < 3 else set())


def assert_same_fields(off, on, bs, live):
    release = type(on)._hooks.release
    for number, (left, right) in enumerate(zip(off.attn_backends, on.attn_backends)):
        expected, found = bare.both_fields(*(backend.decode_cuda_graph_metadata[bs] for backend in (left, right)), live)
        assert expected.keys() <= found.keys()
        for name in expected.keys() - stale_fields(release, off.speculative_num_steps, number):
            tensor = expected[name]
            assert torch.equal(tensor, found[name]), f"{name} of backend {number}, batch {bs}"


def assert_equal_fields(expected, found):
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def live_bytes() -> int:
    """In place of the allocator of a GPU: the storages of all tensors that there are."""
    gc.collect()
    storages = (one.untyped_storage() for one in gc.get_objects() if isinstance(one, torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def page_tables(backend) -> dict[int, int]:
    """Address -> bytes of the page tables that a captured backend holds."""
    found = {}
    for one in getattr(backend, "attn_backends", [backend]):
        buffers = one.decode_cuda_graph_metadata
        tables = [buffers.get("page_table"), buffers.get("real_page_table")]
        for metadata in (value for bs, value in buffers.items() if isinstance(bs, int)):
            tables += [metadata.page_table_1, metadata.real_page_table]
        for storage in (table.untyped_storage() for table in tables if table is not None):
            found[storage.data_ptr()] = storage.nbytes()
    return found
