"""Dims as products of factors, the notation of rules, which op has which rule."""
