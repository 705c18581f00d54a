"""Parameters as shards, and every way in which people read, write and save them."""
