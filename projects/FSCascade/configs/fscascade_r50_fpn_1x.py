"""FSCascade: classification and localisation features shared between stages (both rows on)."""
