"""What the machine gives: files and caches on disk, memory, the libraries of vendors. Light."""
