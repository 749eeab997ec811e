"""The `tokcom` command and what it runs."""
