"""The language: programs, bodies of folds, layouts, shards, kinds of ops."""
