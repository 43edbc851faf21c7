"""Options as data: groups of them, each a frozen dataclass, are a command's whole request."""
