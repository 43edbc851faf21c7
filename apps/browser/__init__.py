"""A page that draws in a browser: its sources, and what makes a site of them and a bundle."""
