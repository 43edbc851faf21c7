"""The side-by-side latency benchmark: contenders in processes of their own, run in turn."""
