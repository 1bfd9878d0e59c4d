"""Metadata lives in pyproject.toml; this file is where the optional CUDA build will hook in."""

from setuptools import setup

setup()
