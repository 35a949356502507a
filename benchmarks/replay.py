"""`sglang-nsa-fused bench replay` over the cases of this repository's results.

    python -m benchmarks.replay [--out FILE] [--commit COMMIT] [--kind draft,verify,extend] [--draft-steps 3,4,6] [--bs 1,4,16,64]
"""

from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console

from benchmarks.record import commit as project_commit
from benchmarks.record import default_path
from sglang_nsa_fused.bench import record
from sglang_nsa_fused.bench.refreshes import Case, Classes, Results, run
from sglang_nsa_fused.bench.replay import KINDS, names, numbers
from sglang_nsa_fused.bench.servers import CACHES, NO_GPU

CONTEXT, SHORT, LONG = 163_840, 512, 131_072


def main(
    kind: Annotated[list, typer.Option(parser=names(KINDS))] = "draft,verify,extend",
    draft_steps: Annotated[list, typer.Option(parser=numbers)] = "3,4,6",
    bs: Annotated[list, typer.Option(parser=numbers)] = "1,4,8,16,32,64",
    samples: Annotated[int, typer.Option(min=10)] = 100,
    out: Annotated[Optional[Path], typer.Option(help="Result file.")] = None,
    commit: Annotated[Optional[str], typer.Option(help="Project commit measured; from git unless given.")] = None,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    # Long contexts and FlashMLA's cache once, with four steps.
    short = [Case(k, n, b, SHORT, "bf16") for k in kind for n in draft_steps for b in bs]
    more = [Case(k, 4, b, c, f) for k in kind for b in bs for c in (SHORT, LONG) for f in CACHES] if 4 in draft_steps else []
    path = out or default_path("replay", torch.cuda.get_device_name())
    results, console = Results(path, record.head("replay", commit or project_commit())), Console(width=120)
    run(dict.fromkeys(short + more), CONTEXT, samples, results, Classes(), console)
    console.print(results.table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
