"""Writes docs/models.md: what runs of each family of transformers' experts.

python tests/families
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402
from families_table import PAGE, page  # noqa: E402

torch.set_num_threads(1)
PAGE.write_text(page())
print(f"{PAGE.relative_to(Path.cwd())} written")
