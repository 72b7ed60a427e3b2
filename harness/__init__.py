"""A benchmark and ablation harness for few-step distillation of diffusion transformers.

Rooms stand on floors and import downwards only; CONTRIBUTING.md lists them and the import contract in `pyproject.toml`
enforces them.
"""

__version__ = "0.1.0"
