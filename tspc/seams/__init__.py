"""Private symbols of torch, by area."""
