"""Ships the published records with the package, of which the repository keeps one copy only.

Everything else about the package stands in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("records.jsonl", "shared.json")
"""What is shipped of `results/<task>/`, as `harness/published/<task>/`; no folder below it is."""


class BuildWithRecords(build_py):
    """Copies the published records into the package that it builds."""

    def build_package_data(self) -> None:
        super().build_package_data()
        for path in published():
            copy = Path(self.build_lib, "harness", "published", path.parent.name, path.name)
            self.mkpath(str(copy.parent))
            self.copy_file(str(path), str(copy))

    def get_source_files(self) -> list[str]:
        """What an sdist holds, so that a wheel can be built from it."""
        return [*super().get_source_files(), *map(str, published())]


def published() -> list[Path]:
    """The files of records that are shipped, relative to the repository."""
    return sorted(path for name in SHIPPED for path in Path("results").glob(f"*/{name}"))


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithRecords})
