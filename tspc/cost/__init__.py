"""Closed forms of what a schedule sends, computes and keeps; the budget of memory."""
