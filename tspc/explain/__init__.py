"""What is said of a program to people."""
