"""What puts passes and runtime together: `backend="tsp"`, and ranks in one process."""
