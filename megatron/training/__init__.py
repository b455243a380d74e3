"""A run from its command line to its last iteration: launched, built, looped, reported, stopped."""
