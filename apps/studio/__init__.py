"""The studio: a page in the browser for trying a student, comparing runtimes, reading a bundle."""
