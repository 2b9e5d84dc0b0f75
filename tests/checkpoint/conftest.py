"""Saves that need not outlive a power cut."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    """For thousands of saves."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
