"""The model that stands in for a real one: DeepSeek-V3.2 with few layers and 16 experts, all other sizes real."""

import json
from pathlib import Path

CONFIG = Path(__file__).parent / "model" / "config.json"
LAYERS = 3  # unless given


def write(folder: Path, layers: int) -> Path:
    """The folder for --model-path: a config alone, for random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads(CONFIG.read_text()) | {"num_hidden_layers": layers}, indent=1))
    return folder
