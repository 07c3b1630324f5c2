"""What every room stands on: settings, capabilities, the registry, argument checks, operators, randomness."""
