"""Who judges an answer: HTTP client, protocols, a model in this process, the reward server, the cache."""
