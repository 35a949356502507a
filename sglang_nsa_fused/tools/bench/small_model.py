"""The model that stands in for a real one: DeepSeek-V3.2 with fewer layers and experts, all other sizes real."""

import json
from pathlib import Path

CONFIG = Path(__file__).parent / "model" / "config.json"
LAYERS = 3  # unless given
EXPERTS = 16  # the least and the step: the router takes the best two of each of 8 groups, and 8 experts of 4 groups


def config(layers: int, experts: int) -> dict:
    """Raises ValueError."""
    if experts < EXPERTS or experts % 8:
        raise ValueError(f"--experts: expected a multiple of 8 from {EXPERTS} on, got {experts}")
    return json.loads(CONFIG.read_text()) | {"num_hidden_layers": layers, "n_routed_experts": experts}


def write(folder: Path, layers: int, experts: int) -> Path:
    """The folder for --model-path: a config alone, for random weights. Raises ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers, experts), indent=1))
    return folder
