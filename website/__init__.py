"""The documentation site: pages made at build time from `docs/`, the registry and `results/`.

`tox -e docs` builds it. It imports the harness, and nothing imports it but its tests.
"""
