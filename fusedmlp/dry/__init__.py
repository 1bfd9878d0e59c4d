"""Calls that compute nothing: what they would launch, and its kernels compiled for a GPU that is
not there.

| file | does |
|---|---|
| `driver.py` | launches compile, or are noted, and PyTorch's operators make empty results |
| `blocks.py` | the fused blocks of a model, and how each is called on rows of nothing |
| `expected.py` | what a block launches on a GPU of the table, its FLOPs and bytes: for explain() |
| `warm.py` | warmup() |
"""
