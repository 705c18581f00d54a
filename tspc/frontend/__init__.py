"""From what Dynamo hands over to a program: a file for each thing that it keeps apart."""
