"""Context binaries for the neural processor of Snapdragons."""
