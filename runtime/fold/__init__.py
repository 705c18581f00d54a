"""A fold on a rank: one step of it, and the schedules."""
