"""Where rows come from.

In reading order:

open      which source a path is
folder    metadata.jsonl, or pictures with captions
tar       WebDataset
tables    parquet and Hugging Face `datasets`
lists     shards, and .json lists of several data sets
packaged  emoji and avatars
"""
