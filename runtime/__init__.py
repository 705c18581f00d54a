"""What runs on ranks: what tspc's ops do there, over process groups or in one process."""
