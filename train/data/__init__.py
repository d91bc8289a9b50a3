"""From raw text to batches: `config` says what to read, `loader` reads it, `prepare` makes record shards of it once."""
