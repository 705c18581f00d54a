"""From decisions to one rank's program: storage, conversions, bodies of folds."""
