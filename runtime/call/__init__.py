"""What surrounds a call: inputs compared and looked up, outputs handed out."""
