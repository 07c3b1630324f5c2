"""Shared test code: tolerances, statistics, poisoned memory, one test body for all backends."""
