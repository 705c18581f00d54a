"""A rank's program through AOTAutograd and Inductor, and the cache of its code."""
