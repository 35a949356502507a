"""`sglang-nsa-fused bench replay` over the cases of this repository's results.

python -m benchmarks.replay [--out FILE] [--commit COMMIT] [--kind draft,verify,extend] [--draft-steps 3,4,5] [--bs 1,64]
"""

from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console

from benchmarks.record import commit as project_commit
from benchmarks.record import default_path
from sglang_nsa_fused.tools.bench import record
from sglang_nsa_fused.tools.bench.refreshes import Case, Classes, Results, run
from sglang_nsa_fused.tools.bench.replay import KINDS, names, numbers
from sglang_nsa_fused.tools.bench.servers import NO_GPU

WIDTHS, SHORT, LONG = (163_840, 1_048_576), 512, 131_072  # the contexts of DeepSeek-V3.2 and of GLM-5.2
MAIN, FEW, WIDTH = 4, (1, 64), WIDTHS[0]  # draft steps and width of what is measured with all the rest


def main(
    kind: Annotated[list, typer.Option(parser=names(KINDS))] = "draft,verify,extend",
    draft_steps: Annotated[list, typer.Option(parser=numbers)] = "3,4,5",
    bs: Annotated[list, typer.Option(parser=numbers)] = "1,8,64,256",
    samples: Annotated[int, typer.Option(min=10)] = 50,
    out: Annotated[Optional[Path], typer.Option(help="Result file.")] = None,
    commit: Annotated[Optional[str], typer.Option(help="Project commit measured; from git unless given.")] = None,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    classes, console = Classes(), Console(width=150)
    some = [b for b in bs if b in FEW] or bs
    grid = [Case(k, MAIN, b, c, w, "bf16") for k in kind for w in WIDTHS for c in (SHORT, LONG) for b in bs]
    grid += [Case(k, n, b, SHORT, WIDTH, "bf16") for k in kind for n in draft_steps if n != MAIN for b in some]
    grid += [Case(k, MAIN, b, SHORT, WIDTH, "fp8") for k in kind for b in some]
    grid += [Case(k, MAIN, b, SHORT, WIDTH, "bf16", True) for k in kind for b in bs if classes.may_enter_graph(k)]
    path = out or default_path("replay", torch.cuda.get_device_name())
    results = Results(path, record.head("replay", commit or project_commit()), classes.release.drop_wide_table is None)
    run(grid, samples, results, classes, console)
    console.print(results.table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
