"""Names to implementations, and the packages that each needs. Light."""
