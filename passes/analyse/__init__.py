"""What is read from a program: factors, sequences, regions, and the folds made of them."""
