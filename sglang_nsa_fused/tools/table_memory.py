"""How many bytes the page tables of a server's captured CUDA graphs take, with and without the plugin.

Of sglang 0.5.15 to 0.5.23 with its default top-k and --speculative-eagle-topk 1. There the plugin leaves out the wide table,
one int32 for each token of the context; what is left is the table of pages, one for all captured batch sizes.
"""

from typing import NamedTuple

PAGE = 64
INT32 = 4


class Held(NamedTuple):
    """Bytes of one graph runner's tables."""

    runner: str
    upstream: int
    ours: int


def columns(context_length: int, draft_tokens: int) -> int:
    """Of the table of slots, req_to_token, and with it of the wide table.

    As get_req_to_token_extra_context_len of 0.5.17 to 0.5.23 has it for pages of 64; in 0.5.15 it is 4 + draft_tokens more.
    """
    return context_length + max(4 + draft_tokens, 2 * draft_tokens + PAGE - 1)


def capture_sizes(max_bs: int) -> list[int]:
    """The batch sizes that a server with speculation captures unless told otherwise.

    As generate_decode_cuda_graph_batch_sizes of 0.5.23; the list is the same from 0.5.15 on.
    """
    sizes = [*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8), *range(272, max_bs + 1, 16)]
    return sorted({max_bs, *(bs for bs in sizes if bs <= max_bs)})


def tables(context_length: int, max_bs: int, draft_tokens: int) -> list[Held]:
    """max_bs: the largest captured batch size; draft_tokens: --speculative-num-draft-tokens."""
    width = columns(context_length, draft_tokens)
    pages = -(-width // PAGE)
    # Of a row of each request. Upstream makes a table of pages for each captured batch size.
    upstream = INT32 * (max_bs * width + sum(capture_sizes(max_bs)) * pages)
    ours = INT32 * max_bs * pages
    backends = draft_tokens - 2  # of the draft steps: the first step's metadata is the draft extend's
    return [
        Held("target verify", draft_tokens * upstream, draft_tokens * ours),
        Held("draft steps", backends * upstream, min(backends, 1) * ours),  # with the plugin they share one set
        Held("draft extend", draft_tokens * upstream, draft_tokens * ours),
    ]


def total(held: list[Held]) -> Held:
    return Held("sum", *(sum(values) for values in list(zip(*held))[1:]))
