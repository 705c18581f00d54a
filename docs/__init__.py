"""The pages of this folder that are made from the code: `make docs` writes them."""
