"""The bundle: a folder of graphs that tiue.json answers for, opened, written, packed. Light."""
