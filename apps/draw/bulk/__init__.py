"""Drawing a table of prompts: tens of thousands of pictures, in shards, resumable."""
