"""How text becomes shards, and which tokens a step reads."""
