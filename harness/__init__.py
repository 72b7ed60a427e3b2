"""A benchmark and ablation harness for few-step distillation of diffusion transformers.

A room imports only from the rooms below it; the import contract in `pyproject.toml` orders them.
"""

__version__ = "0.1.0"
