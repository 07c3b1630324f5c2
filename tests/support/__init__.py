"""What tests stand on: tolerances, statistics, poisoned memory, one body over all backends."""
