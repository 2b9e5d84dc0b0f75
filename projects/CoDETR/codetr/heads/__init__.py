"""Auxiliary heads with one-to-many assignment (Section 6 of the paper's supplement, Tables 7-8)."""
