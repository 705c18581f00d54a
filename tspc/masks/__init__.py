"""Index expressions, and the predicates and scores that are made of them."""
