"""The order of the passes, who runs them, and what happens where one cannot."""
