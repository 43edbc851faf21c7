"""What commands print: tables, stages, failures, the next line."""
