"""Build script: the metadata is in pyproject.toml; what must be computed at build time is here."""

from setuptools import setup

setup()
