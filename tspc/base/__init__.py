"""What every folder may import: errors, the log, registries, options, the text of values."""
