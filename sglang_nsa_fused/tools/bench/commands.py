"""What the plugin gains on this machine: measurements with the plugin off and on."""

import typer

from sglang_nsa_fused.tools.bench.replay import replay
from sglang_nsa_fused.tools.bench.server import server

app = typer.Typer(no_args_is_help=True, help=__doc__)
app.command()(server)
app.command()(replay)
