"""Ops of tspc's own: their schemas, their fakes, what they are on one device."""
