"""Pipelines with text encoders log and warn about what these tests do on purpose."""

from __future__ import annotations

import pytest
from diffusers.utils import logging as diffusers_logging

collect_ignore_glob: list[str] = []
try:
    import transformers
except ImportError:  # every family with a text encoder needs it; `make test` installs it
    collect_ignore_glob.append("*")
else:

    @pytest.fixture(autouse=True)
    def quiet():
        before = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()
        transformers.logging.set_verbosity_error()
        yield
        diffusers_logging.set_verbosity(before)
