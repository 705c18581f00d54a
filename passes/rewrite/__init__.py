"""From a program to an equal one, before anything is known of its factors."""
