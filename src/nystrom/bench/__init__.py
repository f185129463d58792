"""Measurements: one JSON line each, with the machine, versions and commit they ran on."""
